#!/usr/bin/env bash
# Pre-train on all GPUs of one or more machines. ENGINE is replicated (every optimizer), lowrank (galore, galore8bit, qgalore: processes
# exchange projected gradients) or sharded (all but ldadam and muon: weights, gradients and moments are split);
# OPTIMIZER, MODEL, DATA, TOKENIZER and the variables of ../lib.sh say what and where; further options go to `lowrank-opt train`:
#   ENGINE=sharded OPTIMIZER=galore8bit MODEL=llama_1b launchers/lowrank_opt/multi_gpu.sh --max-steps 1000
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

launch lowrank-opt train --mode pretraining --optimizer "${OPTIMIZER:-galore}" --engine "${ENGINE:-replicated}" \
    --model "${MODEL:-llama_350m}" --tokenizer "${TOKENIZER:-t5-base}" --data "${DATA:-allenai/c4:en[36M]}" \
    --max-length 256 --total-batch-size 512 --precision bf16 --max-steps 60000 \
    --schedule cosine --warmup 0.1 --min-lr-ratio 0.1 --weight-decay 0 --lr 0.01 "$@"
