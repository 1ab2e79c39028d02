#!/usr/bin/env bash
# Every optimizer for a thousand tokens of built-in text on the CPU. OPTIMIZERS, MODEL, OUT and the variables of ../lib.sh say what
# and where; further options go to `lowrank-opt train`:
#   OPTIMIZERS="galore ldadam" launchers/lowrank_opt/smoke.sh
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

LAUNCHER=${LAUNCHER:-none}
every="lora galore galore8bit lora+galore lora+galore8bit baseline adamw8bit apollo apollo-mini fira qgalore ldadam muon"
for optimizer in ${OPTIMIZERS:-$every}; do
    # below the smaller side of the smallest matrix, so that there is something to project
    case $optimizer in
        galore | galore8bit | qgalore | fira | ldadam | lora+galore | lora+galore8bit) own=(--rank 4) ;;
        apollo) own=(--apollo-rank 4) ;;
        *) own=() ;;
    esac
    (launch lowrank-opt train --test true --device cpu --mode pretraining --optimizer "$optimizer" --model "${MODEL:-llama_test}" \
        --tokenizer bytes --data builtin:python-docs --packing stream --max-length 64 --batch_size 4 --eval_tokens 512 \
        --output-dir "${OUT:-runs/smoke}/$optimizer" --overwrite "${own[@]}" "$@")
done
