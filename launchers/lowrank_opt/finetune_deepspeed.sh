#!/usr/bin/env bash
# Fine-tune all weights with AdamW under DeepSpeed. MODEL, DATA, ZERO_STAGE (1, 2, 3), OFFLOAD (none, optimizer, all)
# and the variables of ../lib.sh say what and where; further options go to `lowrank-opt train`:
#   MODEL=/models/base DATA=corpus.jsonl ZERO_STAGE=3 OFFLOAD=optimizer launchers/lowrank_opt/finetune_deepspeed.sh
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

LAUNCHER=${LAUNCHER:-deepspeed}
launch lowrank-opt train --mode finetuning --optimizer baseline --engine deepspeed \
    --zero-stage "${ZERO_STAGE:-2}" --offload "${OFFLOAD:-none}" \
    --model "${MODEL:-smollm2-135m}" --data "${DATA:-builtin:python-docs}" --precision bf16 "$@"
