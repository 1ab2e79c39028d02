#!/usr/bin/env bash
# Every evaluation of one model, beside its base with full attention; heat maps lie in figures/ of each folder.
# MODEL, DATA, OUT, MIN_LENGTH, MAX_LENGTH, DRY_RUN and the variables of ../lib.sh say what and where; further options go to every command.
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

LAUNCHER=${LAUNCHER:-none}
MODEL=${MODEL:-runs/smollm2-135m_beacon} OUT=${OUT:-runs/eval} DATA=${DATA:-builtin:python-docs}
lengths=(--min-length "${MIN_LENGTH:-512}" --max-length "${MAX_LENGTH:-2048}")
(launch beacon eval lm --model "$MODEL" --eval-data "$DATA" --packing stream --stride 0 "${lengths[@]}" --baseline full truncate --output-dir "$OUT/lm" "$@")
(launch beacon eval needle --model "$MODEL" --haystack "$DATA" "${lengths[@]}" --num-length-interval 4 --num-depth-interval 5 --baseline full --output-dir "$OUT/needle" "$@")
(launch beacon eval passkey --model "$MODEL" "${lengths[@]}" --num-length-interval 4 --num-depth-interval 5 --baseline full --output-dir "$OUT/passkey" "$@")
(launch beacon eval topic --model "$MODEL" --baseline full --output-dir "$OUT/topic" "$@")
(launch beacon eval multiturn --model "$MODEL" --haystack "$DATA" --length "${MAX_LENGTH:-2048}" --baseline full --output-dir "$OUT/multiturn" "$@")
(launch beacon eval longbench --model "$MODEL" --baseline full --output-dir "$OUT/longbench" "$@")
(launch beacon eval infbench --model "$MODEL" --baseline full --output-dir "$OUT/infbench" "$@")
(launch beacon eval short --model "$MODEL" --baseline full --output-dir "$OUT/short" "$@")
