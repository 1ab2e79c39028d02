#!/usr/bin/env bash
# `rwkv-distill train` under a launcher, with the flags of the guide. CONFIG and the variables of ../lib.sh say what and where:
#   LAUNCHER=none launchers/rwkv_distill/train.sh -l 0.0001 -m 256 -b 2 -r builtin:python-docs -o runs/rwkv -s 1 -t 20k
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

launch rwkv-distill train -c "${CONFIG:-packages/rwkv_distill/presets/tiny.yaml}" "$@"
