#!/usr/bin/env bash
# The whole pipeline on a CPU: split, convert, train, resume, evaluate, export, merge back. A tiny model by default:
#   launchers/moe_cpt/local_smoke.sh [MODEL]        for example smollm2-135m
# OUT is the folder for everything (default: a temporary one, removed at the end); DRY_RUN=1 prints the commands.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=launchers/lib.sh
source "$root/launchers/lib.sh"

model=${1:-}
work=${OUT:-}
if [ -z "$work" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
step() { (show_and_run "$@"); }

if [ -z "$model" ]; then
    model=llama_test data=(--data synthetic:markov) experts=8 length=32
else
    data=(--data builtin:python-docs) experts=16 length=256
fi

step moe-cpt features --model_path "$model" "${data[@]}" --what act --block_size "$length" --max_tokens 2048 -o "$work/act"
step moe-cpt split activation --model_path "$model" --features "$work/act" --num_experts "$experts" -o "$work/split.safetensors"
step moe-cpt convert --model_path "$model" --split_file_path "$work/split.safetensors" --num_selects 2 --gate_network linear \
    --gate_init ridge --calibration_data "${data[1]}" --calibration_tokens 2048 -o "$work/moe"
train=(moe-cpt train --model "$work/moe" "${data[@]}" --block_size "$length" --micro_batch_size 2 --warmup 1 --schedule constant
    --eval_every 2 --held_out_tokens 512 --no-tensorboard -o "$work/run")
step "${train[@]}" --max_steps 2
step "${train[@]}" --max_steps 4 --resume auto
step moe-cpt eval --model "$work/run/final" --eval-data "${data[1]}" --block_size "$length" --eval_tokens 512
step moe-cpt export --model "$work/run/final" --format mixtral --save_path "$work/mixtral"
step moe-cpt export --model "$work/run/final" --format llama --save_path "$work/merged"
