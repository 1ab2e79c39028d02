#!/usr/bin/env bash
# Fine-tune a classifier of texts: finetune_glue.sh [TASK [OPTIMIZER]], by default sst2 with galore. MODEL, DATA (a file with the
# columns of the task; default: GLUE from the hub) and the variables of ../lib.sh say what and where; further options go to `lowrank-opt train`:
#   LAUNCHER=none DATA=train.jsonl launchers/lowrank_opt/finetune_glue.sh rte lora+galore8bit --num-epochs 3
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

task=sst2 optimizer=galore
if [ $# -ge 1 ] && [[ $1 != -* ]]; then task=$1; shift; fi
if [ $# -ge 1 ] && [[ $1 != -* ]]; then optimizer=$1; shift; fi
case $optimizer in
    galore | galore8bit | qgalore | fira | lora+galore | lora+galore8bit) own=(--rank 4 --update-proj-gap 500 --scale 4) ;;
    ldadam) own=(--rank 4) ;;
    *) own=() ;;
esac
data=()
if [ -n "${DATA:-}" ]; then
    data=(--data "$DATA")
fi
launch lowrank-opt train --mode finetuning --task "$task" --optimizer "$optimizer" --model "${MODEL:-roberta}" "${data[@]}" \
    --max-length 512 --micro-batch-size 16 --precision bf16 --num-epochs 30 --lr 3e-5 --weight-decay 0 "${own[@]}" "$@"
