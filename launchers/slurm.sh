#!/usr/bin/env bash
# Run any launcher script on the machines of a Slurm job, one task per machine:
#   sbatch --nodes=2 --gpus-per-node=8 launchers/slurm.sh launchers/lowrank_opt/pretrain.sh --seed 1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: sbatch --nodes=N launchers/slurm.sh SCRIPT [OPTIONS...]" >&2; exit 2; }

# The port follows from the job, so that two jobs on one machine do not meet.
MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
NUM_NODES=${SLURM_JOB_NUM_NODES:-1}
MASTER_ADDR=127.0.0.1
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
export MASTER_PORT NUM_NODES MASTER_ADDR

# A requeued job finds its run folder occupied; auto continues from the newest complete checkpoint.
command=(srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash "$@" --resume auto)
printf '%q ' "${command[@]}"
echo
if [ "${DRY_RUN:-0}" != 1 ]; then
    exec "${command[@]}"
fi
