#!/usr/bin/env bash
# Run any launcher script on the machines of a Slurm job, one task per machine:
#   sbatch --nodes=2 --gpus-per-node=8 launchers/slurm.sh launchers/lowrank_opt/pretrain.sh --seed 1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -euo pipefail
# Submitted from the repository. MASTER_ADDR names machine 0 where its Slurm name does not resolve.
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
# shellcheck source=launchers/lib.sh
source "$root/launchers/lib.sh"

[ $# -ge 1 ] || { echo "usage: sbatch --nodes=N launchers/slurm.sh SCRIPT [OPTIONS...]" >&2; exit 2; }

export NUM_NODES=${SLURM_JOB_NUM_NODES:-1}

# A requeued job finds its run folder occupied; auto continues from the newest complete checkpoint.
run_step srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash "$@" --resume auto
