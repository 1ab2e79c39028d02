#!/usr/bin/env bash
# Pre-train a LLaMA on C4 as a Slurm job that is queued again before its time is over, and goes on from its newest checkpoint:
#   sbatch --nodes=2 --gpus-per-node=8 launchers/lowrank_opt/slurm_pretrain.sh 1b galore8bit
# SIZE, OPTIMIZER and further options are those of pretrain_c4.sh.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -euo pipefail
# Slurm runs a copy of this script, so the repository is where it was submitted
here=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
# shellcheck source=launchers/slurm.sh
source "$here/launchers/slurm.sh" "$here/launchers/lowrank_opt/pretrain_c4.sh" "$@"
