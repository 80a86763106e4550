#!/usr/bin/env bash
# Check and measure everything on one GPU, in under nine minutes; the table is printed last.
#
#   bash bench/gpu.sh                       results under runs/bench (or under $OUT)
#   bash bench/gpu.sh --data FOLDER         the short run on real shards instead of a made-up language
#   bash bench/gpu.sh --parts checks,steps  some parts (see bench/gpu.py)
#
# Any python3 with torch, numpy and brotli will do (PYTHON=... names another); nothing is downloaded. To bring an attention wheel to
# a machine without a network, unpack it into a folder and put that on PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu.py --out "${OUT:-runs/bench}" "$@"
