#!/usr/bin/env bash
#SBATCH --job-name=moe_16_4_static
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
# 4 of 16 experts on fluency-filtered data, with the fixed source shares of Sheared-LLaMA: 14 machines with 8 GPUs.
# Paths come from the environment (lib.sh). From the repository: mkdir -p logs; MODEL=... DATA=... VALID=... sbatch launchers/moe_cpt/dynamic_data_selection/baseline_112gpus_sheared_llama_portion_fluency.sh
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
eval_steps=340
save_steps=340
logging_steps=5
omp_num_threads=32

train_mixture --num_selects 4 --moe_calculator_score_scale_factor 4.0 --prob_map sheared_llama "$@"
