#!/usr/bin/env bash
# bash run.sh        the whole system, small: data, training, artifact, scoring in a fresh process, test-time training
# bash run.sh test   the tests
# Both need Python >= 3.11 only: the first call makes .venv and installs what is pinned; later calls reuse it and the data.
# Any setting can be given in the environment (SEED=1 bash run.sh); DATA_DIR says where the data goes (default ./data).
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: run.sh needs Python >= 3.11; '$python' is not. Install one, or name it: PYTHON=/path/to/python3.11 bash run.sh" >&2
    exit 2
fi

install() { # install FILE: its packages into .venv, once for each content of the file
    local stamp=.venv/installed-$1
    if ! cat requirements*.txt | cmp -s - "$stamp"; then
        echo "installing $1 into .venv"
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
        cat requirements*.txt > "$stamp"
    fi
}

if [ "${1:-}" = test ]; then
    shift
    install requirements-test.txt
    export OMP_NUM_THREADS=1 # a test a core
    exec .venv/bin/python -m pytest -q -n auto --max-worker-restart 0 --dist loadfile --no-loadscope-reorder "$@" tests
fi
[ $# = 0 ] || { echo "usage: bash run.sh [test [pytest arguments]]" >&2; exit 2; }

began=$SECONDS
install requirements.txt
export DATA_DIR=${DATA_DIR:-./data} ARTIFACT_DIR=${ARTIFACT_DIR:-./runs}
echo "[$((SECONDS - began)) s] data"
# the version that scores best on the sample; CASEOPS_VERSION=lossless_caps_caseops_v1 takes the published one
export CASEOPS_VERSION=${CASEOPS_VERSION:-lossless_caps_caseops_v2_titles}
.venv/bin/python prepare_caseops_data.py --sample --transform "$CASEOPS_VERSION" --data-dir "$DATA_DIR"
export DATA_PATH=${DATA_PATH:-$DATA_DIR/datasets/sample_sp8192_$CASEOPS_VERSION}
tokenizer=${CASEOPS_VERSION}_8192
[ "$CASEOPS_VERSION" != lossless_caps_caseops_v1 ] || tokenizer=caseops_8192_lossless # older than the versions
export TOKENIZER_PATH=${TOKENIZER_PATH:-tokenizers/$tokenizer.model}

while IFS= read -r line; do # settings that the caller made stay
    name=${line%%=*}
    case $line in \#* | "") ;; *) [ -n "${!name+set}" ] || export "$line" ;; esac
done < tools/small.env
export SEED=${SEED:-1337}
export RUN_ID=${RUN_ID:-small_$(date -u +%Y%m%d_%H%M%S)_seed$SEED}

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
start=(.venv/bin/python)
for ranks in 2 4 8; do
    [ "$gpus" -lt "$ranks" ] || start=(.venv/bin/python -m torch.distributed.run --standalone --nproc_per_node="$ranks")
done

echo "[$((SECONDS - began)) s] training (seed $SEED)"
TTT_ENABLED=0 "${start[@]}" train_gpt.py
artifact=$ARTIFACT_DIR/$RUN_ID.artifact
echo "[$((SECONDS - began)) s] scoring $artifact in a fresh process"
TTT_ENABLED=${TTT_ENABLED:-1} EVAL_ONLY=1 ARTIFACT_PATH=$artifact "${start[@]}" train_gpt.py

trained=$ARTIFACT_DIR/$RUN_ID.log scored=$ARTIFACT_DIR/$RUN_ID.eval1.log
score_of() { sed -n 's/^eval name:quantized val_loss:[^ ]* val_bpb:\([^ ]*\).*/\1/p' "$1"; }
[ "$(score_of "$trained")" = "$(score_of "$scored")" ] ||
    { echo "error: the fresh process scored $(score_of "$scored"), the training run $(score_of "$trained")" >&2; exit 1; }
echo "[$((SECONDS - began)) s] done; logs $trained $scored, artifact $artifact"
grep '^final ' "$scored"
