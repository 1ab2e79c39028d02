#!/usr/bin/env bash
#SBATCH --job-name=moe_16_4_dynamic
#SBATCH --partition=MoE
#SBATCH --nodes=14
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --output=logs/%x-%j.log
#SBATCH --error=logs/%x-%j.log
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
# 4 of 16 experts, with source shares that follow the held-out losses: 14 machines with 8 GPUs.
# Paths come from the environment (lib.sh). From the repository: mkdir -p logs; MODEL=... DATA=... VALID=... sbatch launchers/moe_cpt/dynamic_data_selection/sheared_llama_112gpus.sh
set -euo pipefail
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)}
# shellcheck source=launchers/moe_cpt/lib.sh
source "$root/launchers/moe_cpt/lib.sh"

num_nodes=14
num_gpu_per_node=8
per_device_train_batch_size=8
gradient_accumulation_steps=4
block_size=4096
num_tokens='200*10^9'
learning_rate=2e-4
final_lr_portion=0.1
warmup_steps=100
# evaluations move the shares, one every 2.5*10^9 tokens
eval_steps=$((2500000000 / (per_device_train_batch_size * gradient_accumulation_steps * num_nodes * num_gpu_per_node * block_size)))
save_steps=$eval_steps
logging_steps=5
omp_num_threads=32

train_mixture --num_selects 4 --moe_calculator_score_scale_factor 4.0 --prob_map llama --dynamic_data_selection sheared_llama "$@"
