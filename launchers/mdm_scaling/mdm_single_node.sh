#!/usr/bin/env bash
# Train one model on this machine, or all runs of a manifest that are not done yet. The variables of ../lib.sh say where;
# options go to `mdm-scaling pretrain`, or, after a manifest, to `mdm-scaling runs start`:
#   PROCESSES=8 launchers/mdm_scaling/mdm_single_node.sh --objective mdm --preset 117M --tokenizer gpt2 --data corpora/c4 --flops 1e19
#   launchers/mdm_scaling/mdm_single_node.sh sweep.jsonl --jobs 2
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

case ${1:-} in
    *.jsonl)
        manifest=$1
        shift
        # each run is a process of its own, so no launcher starts several
        LAUNCHER=none launch mdm-scaling runs start "$manifest" "$@"
        ;;
    *)
        launch mdm-scaling pretrain --config "${CONFIG:-packages/mdm_scaling/presets/smollm2_135m_mdm.yaml}" "$@"
        ;;
esac
