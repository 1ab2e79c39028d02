#!/usr/bin/env bash
#SBATCH --job-name=moe_lora
#SBATCH --partition=MoE
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --output=logs/%x-%j.log
#SBATCH --error=logs/%x-%j.log
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
# Adapters on attention and experts, the routers trained in full: 2 machines with 8 GPUs.
# Paths come from the environment (lib.sh). From the repository: mkdir -p logs; MODEL=... DATA=... VALID=... sbatch launchers/moe_cpt/lora.sh
set -euo pipefail
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
# shellcheck source=launchers/moe_cpt/lib.sh
source "$root/launchers/moe_cpt/lib.sh"

num_nodes=2
num_gpu_per_node=8
per_device_train_batch_size=16
gradient_accumulation_steps=1
block_size=2048
num_tokens='10^11'
learning_rate=2e-4
final_lr_portion=0.0
warmup_steps=2000
save_steps=1000
logging_steps=10
omp_num_threads=32

train_mixture --mode lora --lora_rank 8 --lora_alpha 32 --lora_dropout 0.05 \
    --trainable q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj --save_total_limit 3 "$@"
