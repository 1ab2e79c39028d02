#!/usr/bin/env bash
# Pre-train a LLaMA with GaLore. MODEL, DATA, TOKENIZER, OPTIMIZER and the variables of ../lib.sh say what and where;
# further options go to `lowrank-opt train`:
#   MODEL=llama_1b DATA=/data/c4 NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=host0 launchers/lowrank_opt/pretrain.sh --budget "13.1B tokens"
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

launch lowrank-opt train --mode pretraining --optimizer "${OPTIMIZER:-galore}" \
    --model "${MODEL:-llama_60m}" --tokenizer "${TOKENIZER:-bpe:16384}" --data "${DATA:-builtin:stdlib}" \
    --packing stream --max-length 256 --precision bf16 \
    --schedule cosine --warmup 0.1 --min-lr-ratio 0.1 --weight-decay 0 --lr 0.01 "$@"
