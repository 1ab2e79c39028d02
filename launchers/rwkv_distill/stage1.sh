#!/usr/bin/env bash
# Stage 1 of the guide: align every layer of the student with its teacher.
# CONFIG, DATA, OUT, DEVICE, TOKENS and the variables of ../lib.sh say what and where; further options go to `rwkv-distill train`, and a
# later one wins:
#   LAUNCHER=none DEVICE=cpu TOKENS=20k launchers/rwkv_distill/stage1.sh --overwrite
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

launch rwkv-distill train -c "${CONFIG:-packages/rwkv_distill/presets/tiny.yaml}" \
    -l 0.0001 -f 0.00001 -m 2048 -b 2 -r "${DATA:-synthetic:markov}" -o "${OUT:-runs/rwkv_stage1}" -g 1 -F 0 -d 1 \
    -t 1000_000_000 -T 0.2 -R v7 -s 1 -M 1 \
    ${DEVICE:+--device "$DEVICE"} ${TOKENS:+-t "$TOKENS"} "$@"
