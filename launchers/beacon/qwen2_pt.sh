#!/usr/bin/env bash
# The guide's recipe qwen2_pt: packages/beacon/presets/qwen2_7b_pt.yaml under ZeRO 2.
# NPROC, DATA_ROOT, OUT, DRY_RUN and the variables of ../lib.sh say what and where; further options go to `beacon train`, and a later one wins.
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

PROCESSES=${PROCESSES:-${NPROC:-}}
launch beacon train --config packages/beacon/presets/qwen2_7b_pt.yaml --deepspeed launchers/conf/deepspeed/zero2.json \
    --data-root "${DATA_ROOT:-data}" --output-dir "${OUT:-runs/qwen2_7b_pt}" "$@"
