#!/usr/bin/env bash
# Runs the seeds of this record (0 42 1234), or those given: bash run.sh [SEED...]
# Logs and artifacts go to $ARTIFACT_DIR (./runs). DATA_PATH and TOKENIZER_PATH may say where data is.
set -euo pipefail
cd "$(dirname "$0")"

export COMPILE=0
export EMA_DECAY=0.95
export EVAL_BUDGET_SECONDS=0
export EVAL_SEQ_LEN=512
export GLOBAL_TTT_BATCH_SEQS=4
export GLOBAL_TTT_CHUNK_TOKENS=2048
export ITERATIONS=120
export MAX_WALLCLOCK_SECONDS=0
export MODEL_DIM=96
export MUON_MOMENTUM_WARMUP_STEPS=40
export NUM_HEADS=4
export NUM_KV_HEADS=2
export OMP_NUM_THREADS=1
export PHASED_TTT_PREFIX_DOCS=48
export TRAIN_BATCH_TOKENS=2048
export TRAIN_LOG_EVERY=10
export TRAIN_SEQ_LEN=512
export TTT_BATCH_SIZE=16
export TTT_CHUNK_SIZE=96
export TTT_CONTEXT=cache
export TTT_EVAL_SEQ_LEN=512
export TTT_LORA_LR=0.003
export TTT_LORA_RANK=8
export VAL_BATCH_TOKENS=32768
export VAL_LOSS_EVERY=0
export WARMUP_STEPS=1
: "${DATA_PATH:=./data/datasets/sample_sp8192_lossless_caps_caseops_v1}"; export DATA_PATH
: "${TOKENIZER_PATH:=tokenizers/caseops_8192_lossless.model}"; export TOKENIZER_PATH
: "${ARTIFACT_DIR:=./runs}"; export ARTIFACT_DIR

[ -d "$DATA_PATH" ] || "${PYTHON:-python3}" prepare_caseops_data.py --sample --val-docs 200
[ $# -gt 0 ] || set -- 0 42 1234
for seed in "$@"; do
    SEED=$seed RUN_ID=train_seed$seed "${PYTHON:-python3}" train_gpt.py
done
