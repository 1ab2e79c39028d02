#!/usr/bin/env bash
# What the method promises, measured. DRY_RUN prints the command; further options go to `beacon bench`.
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

LAUNCHER=${LAUNCHER:-none}
launch beacon bench "$@"
