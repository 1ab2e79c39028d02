#!/usr/bin/env bash
# Pack the text under SOURCES (a folder of SOURCE.jsonl files) for the recipes: blocks of 8192 tokens, mixture slimpajama.
# SOURCES, DATA_ROOT, OUT and DRY_RUN say what and where; further options go to `beacon pretrain-data`, and a later one wins.
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

LAUNCHER=${LAUNCHER:-none}
launch beacon pretrain-data --model-name-or-path meta-llama/Llama-2-7b-chat-hf --train-data "${SOURCES:-${DATA_ROOT:-data}/slimpajama}" \
    --mixture slimpajama --num-token 8192:2b --doc-ids true --output-dir "${OUT:-${DATA_ROOT:-data}/pretrain/llama-8K_2B}" "$@"
