#!/usr/bin/env bash
# Fine-tune a model with GaLore. MODEL, DATA, OPTIMIZER and the variables of ../lib.sh say what and where;
# further options go to `lowrank-opt train`:
#   MODEL=/models/base DATA=corpus.jsonl PROCESSES=8 launchers/lowrank_opt/finetune.sh --budget "2 epochs"
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

launch lowrank-opt train --mode finetuning --optimizer "${OPTIMIZER:-galore}" \
    --model "${MODEL:-smollm2-135m}" --data "${DATA:-builtin:python-docs}" --precision bf16 "$@"
