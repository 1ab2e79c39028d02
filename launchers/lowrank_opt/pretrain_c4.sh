#!/usr/bin/env bash
# Pre-train a LLaMA on C4 by the published recipes: pretrain_c4.sh [SIZE [OPTIMIZER]] with SIZE 60m, 130m, 350m, 1b or 7b.
# DATA, TOKENIZER, MICRO_BATCH and the variables of ../lib.sh say what and where; further options go to `lowrank-opt train`:
#   PROCESSES=8 launchers/lowrank_opt/pretrain_c4.sh 350m galore8bit --seed 1
# As a Slurm job: slurm_pretrain.sh.
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

size=60m optimizer=galore
if [ $# -ge 1 ] && [[ $1 != -* ]]; then size=$1; shift; fi
if [ $# -ge 1 ] && [[ $1 != -* ]]; then optimizer=$1; shift; fi

lr=0.01 gap=200 clip=0
case $size in
    60m) rank=128 steps=10000 micro=64 ;;
    130m) rank=256 steps=20000 micro=64 ;;
    350m) rank=256 steps=60000 micro=32 ;;
    1b) rank=512 steps=100000 micro=16 ;;
    7b) rank=1024 steps=150000 micro=8 lr=0.005 gap=500 clip=1 ;;
    *) fail "SIZE: '$size' has no recipe; use 60m, 130m, 350m, 1b or 7b" ;;
esac
case $optimizer in
    galore | galore8bit | qgalore | fira) own=(--rank "$rank" --update-proj-gap "$gap" --scale 0.25) ;;
    ldadam) own=(--rank "$rank") ;;
    apollo) own=(--apollo-rank "$rank" --apollo-update-proj-gap "$gap") ;;
    *) own=() ;;
esac
# as many rows as the run takes, and some that are shorter than a sample
launch lowrank-opt train --mode pretraining --optimizer "$optimizer" --model "llama_$size" \
    --tokenizer "${TOKENIZER:-t5-base}" --data "${DATA:-allenai/c4:en[$((steps * 600))]}" --packing document --max-length 256 \
    --micro-batch-size "${MICRO_BATCH:-$micro}" --total-batch-size 512 --precision bf16 --max-steps "$steps" \
    --schedule cosine --warmup 0.1 --min-lr-ratio 0.1 --weight-decay 0 --lr "$lr" --grad-clip "$clip" "${own[@]}" "$@"
