#!/usr/bin/env bash
# The guide's example: LLaMA 1B with LoRA on C4. MODEL, OPTIMIZER, DATA and the variables of ../lib.sh say what and where;
# further options go to `lowrank-opt train`, and a later one wins. On a machine of any size:
#   LAUNCHER=none launchers/lowrank_opt/pretrain_guide.sh --dry-run
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

data=()
if [ -n "${DATA:-}" ]; then
    data=(--data "$DATA")
fi
launch lowrank-opt train --mode pretraining --optimizer "${OPTIMIZER:-lora}" --model "${MODEL:-llama_1b}" \
    --batch_size 32 --num_epochs 20 --shuffle false --lr 3e-4 "${data[@]}" "$@"
