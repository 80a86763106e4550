#!/usr/bin/env bash
# Runs the published configuration on 8 GPUs with this repository's code: bash run.sh
# The data: python prepare_caseops_data.py --download, in the repository, or DATA_DIR.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../../.."
[ -f train_gpt.py ] || { echo "error: this folder holds no code; it runs inside the repository" >&2; exit 2; }
exec python3 tools/make_record.py --slug DepthCurriculum --seeds 0,42,1234 --env "$here/record.env" \
    --base "$here" -- torchrun --standalone --nproc_per_node=8
