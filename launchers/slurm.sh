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

# The port follows from the job, so that two jobs on one machine do not meet.
MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
NUM_NODES=${SLURM_JOB_NUM_NODES:-1}
if [ -z "${MASTER_ADDR:-}" ]; then
    MASTER_ADDR=127.0.0.1
    if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    fi
fi
export MASTER_PORT NUM_NODES MASTER_ADDR

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
