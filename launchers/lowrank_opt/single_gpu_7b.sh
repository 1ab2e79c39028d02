#!/usr/bin/env bash
# LLaMA 7B on one GPU of 24 GiB: weights and states take 18.6 GiB, one gradient lives at a time. DATA, TOKENIZER and the
# variables of ../lib.sh say what and where; further options go to `lowrank-opt train`:
#   launchers/lowrank_opt/single_gpu_7b.sh --dry-run
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

export PROCESSES=${PROCESSES:-1}
launch lowrank-opt train --mode pretraining --optimizer galore8bit --model llama_7b \
    --tokenizer "${TOKENIZER:-t5-base}" --data "${DATA:-allenai/c4:en[10M]}" --packing document --max-length 256 \
    --micro-batch-size 16 --precision bf16 --per-layer true --gradient-checkpointing true --max-steps 150000 \
    --schedule cosine --warmup 0.1 --min-lr-ratio 0.1 --weight-decay 0 --lr 0.005 --grad-clip 1 \
    --rank 1024 --update-proj-gap 500 --scale 0.25 "$@"
