#!/usr/bin/env bash
# The whole way in minutes on two cores: packed data, pre-training, fine-tuning and a needle heat map, with a random model of two layers.
# OUT, DRY_RUN and the variables of ../lib.sh say where; further options go to every command.
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

LAUNCHER=${LAUNCHER:-none} OUT=${OUT:-runs/beacon_tiny_cpu}
(launch beacon pretrain-data --model llama_tiny --tokenizer bytes --train-data recall=synthetic:recall words=synthetic:markov \
    --num-token 256:100k --output-dir "$OUT/data" "$@")
(launch beacon train --config packages/beacon/presets/tiny.yaml --train-data "$OUT/data" --beacon-doc-mask true --packing document \
    --max-steps 30 --budget "" --output-dir "$OUT/pt" "$@")
(launch beacon train --model "$OUT/pt" --train-data synthetic:recall --packing stream --max-length 288 --beacon-doc-mask false \
    --group-by-stride strict --max-steps 20 --lr 1e-3 --save-only-model --output-dir "$OUT/ft" "$@")
(launch beacon eval needle --model "$OUT/ft" --min-length 256 --max-length 512 --num-length-interval 2 --num-depth-interval 3 \
    --max-new-tokens 40 --output-dir "$OUT/needle" "$@")
