#!/usr/bin/env bash
# The dress rehearsal: the record at full size on a CUDA device that computes nothing, on a machine without a GPU.
#
#   bash bench/rehearse.sh                   all parts; the table is printed last, exit status 1 if a row is not as it must be
#   bash bench/rehearse.sh steps sgd         some parts (see bench/rehearse.py)
#   bash bench/rehearse.sh evaluate sgd EVAL_SEQ_LEN=3072       with settings of train_gpt.py
#
# Needs Linux on x86-64, g++, 16 GB of memory. The first call makes .venv-cuda with the CUDA build of torch. Logs, launches and
# the table go to runs/rehearsal (OUT=... names another folder). REPO=... takes train_gpt.py from another checkout.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv-cuda/bin/python
if ! [ -x "$python" ]; then
    echo "making .venv-cuda: the CUDA build of torch and its libraries, a download of about 3 GB, 4.8 GB on disk"
    "${PYTHON:-python3}" -m venv .venv-cuda
fi
if ! "$python" -c 'import torch, train_gpt; assert torch.version.cuda' 2> /dev/null; then
    # the === takes the build that the index has under the bare number, which is CUDA's on Linux; a local version would not match it
    "$python" -m pip install --quiet --disable-pip-version-check 'torch===2.13.0' $(grep -v '^torch' requirements.txt)
fi
bash bench/null_cuda/build.sh "$python"
exec "$python" bench/rehearse.py run --out "${OUT:-runs/rehearsal}" "$@"
