#!/usr/bin/env bash
# Convert one dense model by every split with a ridge router, and by the three splits that need no scores with the other routers; train each
# mixture with the same data, rate, updates and seed, and compare them.
# What is there is not made again, so an interrupted comparison goes on:
#   OUT=runs/splits STEPS=200 launchers/moe_cpt/compare_splits.sh [MODEL]        default: smollm2-135m
# DATA is a comma list of sources (default: builtin:python-docs,builtin:stdlib), TOKENS what splits and routers look at (8192),
# EVAL_TOKENS the held-out tokens of each source (4096), EVAL_EVERY how often they are used (0.5), SEED the address of splits, routers and
# data (1227); DRY_RUN=1 prints the commands.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=launchers/lib.sh
source "$root/launchers/lib.sh"

model=${1:-smollm2-135m}
out=${OUT:-runs/splits}
sources=${DATA:-builtin:python-docs,builtin:stdlib}
tokens=${TOKENS:-8192}
seed=${SEED:-1227}
data=()
IFS=, read -ra names <<<"$sources"
for name in "${names[@]}"; do data+=(--data "$name"); done

# once PLACE COMMAND...: run a command that makes PLACE, unless it is there
once() {
    local made=$1
    shift
    [ -e "$made" ] || (show_and_run "$@")
}

split() {
    once "$out/$1.safetensors" moe-cpt split "$1" --model_path "$model" --num_experts 16 --seed "$seed" -o "$out/$1.safetensors" "${@:2}"
}

# trained NAME MIXTURE OPTIONS OF TRAIN...
trained() {
    once "$out/$1/run/final" moe-cpt train --model "$out/$2/moe" --dataset_dir "$sources" --block_size 256 --micro_batch_size 2 \
        --max_steps "${STEPS:-40}" --warmup 0.1 --lr 3e-4 --final_lr_portion 0.1 --held_out_tokens "${EVAL_TOKENS:-4096}" \
        --log_every 1 --save_every 20 --resume auto --seed "$seed" "${@:3}" -o "$out/$1/run"
    # a finished run is not resumed
    [ ! -e "$out/$1/run/final" ] || rm -rf "$out/$1/run/checkpoints"
    runs+=("$out/$1/run")
}

# mixture NAME SPLIT OPTIONS OF CONVERT...
mixture() {
    once "$out/$1/moe" moe-cpt convert --model_path "$model" --split_file_path "$out/$2.safetensors" --num_selects "${selects:-4}" \
        --seed "$seed" -o "$out/$1/moe" "${@:3}"
    trained "$1" "$1" --eval_every "${EVAL_EVERY:-0.5}"
}

once "$out/act" moe-cpt features --model_path "$model" "${data[@]}" --what inputs --what act --block_size 512 --max_tokens "$tokens" -o "$out/act"
once "$out/up" moe-cpt features --model_path "$model" "${data[@]}" --what up --block_size 512 --max_tokens $((tokens / 4)) -o "$out/up"
once "$out/clusters" moe-cpt cluster-text "${data[@]}" -n 16 -m "$out/centres" -o "$out/clusters"
once "$out/score.safetensors" moe-cpt score --model "$model" --dataset "$out/clusters" --block_size 512 --max_tokens 1024 -o "$out/score.safetensors"
once "$out/clusters14" moe-cpt cluster-text "${data[@]}" -n 14 -m "$out/centres14" -o "$out/clusters14"
once "$out/score14.safetensors" moe-cpt score --model "$model" --dataset "$out/clusters14" --block_size 512 --max_tokens 1024 -o "$out/score14.safetensors"
split random
split clustering
split activation --features "$out/act"
split graph --hidden_features_path "$out/up"
split gradient --score_file_path "$out/score.safetensors"
# 14 routed and 2 shared experts are 16 equal parts; with 2 routed ones selected 4 of the 16 see a token, as in the others
once "$out/residual.safetensors" moe-cpt split residual --model_path "$model" --num_experts 14 --num_experts_residual 2 --seed "$seed" \
    --score_file_path "$out/score14.safetensors" -o "$out/residual.safetensors"
for method in random clustering activation; do
    once "$out/$method-gate.safetensors" moe-cpt train-gate --model_path "$model" --split_file_path "$out/$method.safetensors" \
        --hidden_features_path "$out/act" --gate_network linear --epochs 30 --seed "$seed" -o "$out/$method-gate.safetensors"
done

once "$out/dense.json" moe-cpt ref-loss --model "$model" --validation_dir "$sources" --block_size 256 --micro_batch_size 2 \
    --eval_tokens "${EVAL_TOKENS:-4096}" --precision bf16 -o "$out/dense.json"
runs=()
ridge=(--gate_network linear --gate_init ridge --calibration_tokens $((tokens / 2)) "${data[@]/#--data/--calibration_data}")
for method in random clustering activation graph gradient; do
    mixture "$method-ridge" "$method" "${ridge[@]}"
done
selects=2 mixture residual-ridge residual "${ridge[@]}"
mixture activation-normal-mlp activation
for method in random clustering activation; do
    mixture "$method-normal-linear" "$method" --gate_network linear
    mixture "$method-centroid" "$method" --gate_network linear --gate_init centroid
    mixture "$method-trained" "$method" --gate_network linear --gate_init trained --select_file_path "$out/$method-gate.safetensors"
done

# the best of them with factors measured against the dense model in place of N / K, and with shares of the sources that follow the loss
once "$out/scales.json" moe-cpt calibrate-scale --model_path "$out/activation-ridge/moe" --dense_path "$model" "${data[@]}" --mode lsq \
    --layerwise --max_tokens $((tokens / 2)) -o "$out/scales.json"
mixture activation-ridge-lsq activation "${ridge[@]}" --score_scale_factor_file_path "$out/scales.json"
trained activation-ridge-dynamic activation-ridge --eval_every 0.125 --dynamic_data_selection sheared_llama \
    --dynamic_eta 0.2 --reference_loss "$out/dense.json"
show_and_run moe-cpt report "${runs[@]}" -o "$out/report"
