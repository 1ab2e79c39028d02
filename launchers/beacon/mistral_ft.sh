#!/usr/bin/env bash
# The guide's recipe mistral_ft: packages/beacon/presets/mistral_7b_ft.yaml under ZeRO 2.
# NPROC, DATA_ROOT, OUT, DRY_RUN and the variables of ../lib.sh say what and where; further options go to `beacon train`, and a later one wins.
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

PROCESSES=${PROCESSES:-${NPROC:-}}
launch beacon train --config packages/beacon/presets/mistral_7b_ft.yaml --deepspeed launchers/conf/deepspeed/zero2.json \
    --data-root "${DATA_ROOT:-data}" --output-dir "${OUT:-runs/mistral_7b_ft}" "$@"
