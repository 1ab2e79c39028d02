#!/usr/bin/env bash
# Run any launcher script on the machines of a Slurm job, one task per machine:
#   sbatch --nodes=2 --gpus-per-node=8 launchers/slurm.sh launchers/lowrank_opt/pretrain.sh --seed 1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -euo pipefail
# Three minutes before the time limit Slurm signals this script, which lets the run save and queues the job again. A job that is
# cancelled is not queued again. MASTER_ADDR names machine 0 where its Slurm name does not resolve.

[ $# -ge 1 ] || { echo "usage: sbatch --nodes=N launchers/slurm.sh SCRIPT [OPTIONS...]" >&2; exit 2; }

export NUM_NODES=${SLURM_JOB_NUM_NODES:-1}

# A requeued job finds its run folder occupied; auto continues from the newest complete checkpoint.
command=(srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash "$@" --resume auto)
printf '%q ' "${command[@]}"
echo
[ "${DRY_RUN:-0}" != 1 ] || exit 0

warned=0
trap 'warned=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
"${command[@]}" &
code=0
# a signal ends `wait` before the step does
while wait $! && code=0 || code=$?; kill -0 $! 2>/dev/null; do :; done
if [ "$warned" = 1 ] && [ "$code" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
