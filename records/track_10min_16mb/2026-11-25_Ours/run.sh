#!/usr/bin/env bash
# Runs this configuration on 8 GPUs with this repository's code: bash run.sh
# The data: the recipe in README.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../../.."
[ -f train_gpt.py ] || { echo "error: this folder holds no code; it runs inside the repository" >&2; exit 2; }
exec python3 tools/make_record.py --slug Ours --seeds 0,42,314 --env "$here/record.env" \
    --base records/track_10min_16mb/2026-11-23_CaseOps_DepthCurriculum_Published -- torchrun --standalone --nproc_per_node=8
