#!/usr/bin/env bash
# The same task for every optimizer, then their losses, memory and speed in one table and one picture. OPTIMIZERS, MODEL, DATA, OUT
# and the variables of ../lib.sh say what and where; further options go to `lowrank-opt train`. A run that was interrupted goes on:
#   LAUNCHER=none OUT=runs/compare launchers/lowrank_opt/compare.sh --max-steps 40 --micro-batch-size 2
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

every="lora galore galore8bit lora+galore lora+galore8bit baseline adamw8bit apollo apollo-mini fira qgalore ldadam muon"
folders=()
for optimizer in ${OPTIMIZERS:-$every}; do
    folders+=("${OUT:-runs/compare}/$optimizer")
    (launch lowrank-opt train --mode finetuning --optimizer "$optimizer" --model "${MODEL:-smollm2-135m}" \
        --data "${DATA:-builtin:python-docs}" --packing stream --max-length 256 --precision bf16 --max-steps 200 \
        --schedule cosine --warmup 0.1 --weight-decay 0 --output-dir "${folders[-1]}" --resume auto "$@")
done
show_and_run lowrank-opt compare "${folders[@]}" --out "${OUT:-runs/compare}/table.csv" --picture "${OUT:-runs/compare}/runs.png"
