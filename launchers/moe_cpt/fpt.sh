#!/usr/bin/env bash
#SBATCH --job-name=moe_fpt
#SBATCH --partition=MoE
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=32
#SBATCH --output=logs/%x-%j.log
#SBATCH --error=logs/%x-%j.log
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
# All parameters: 1 machine with 8 GPUs.
# Paths come from the environment (lib.sh). From the repository: mkdir -p logs; MODEL=... DATA=... VALID=... sbatch launchers/moe_cpt/fpt.sh
set -euo pipefail
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
# shellcheck source=launchers/moe_cpt/lib.sh
source "$root/launchers/moe_cpt/lib.sh"

num_nodes=1
num_gpu_per_node=8
per_device_train_batch_size=16
gradient_accumulation_steps=2
block_size=2048
num_tokens='10^11'
learning_rate=1e-4
final_lr_portion=0.1
warmup_steps=2000
save_steps=1000
logging_steps=10
omp_num_threads=16

train_mixture --mode fpt --save_total_limit 2 "$@"
