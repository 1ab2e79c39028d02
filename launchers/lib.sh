# Shared by the launcher scripts. Source it, then call `launch COMMAND ARGUMENTS...` with a package's public command.
#
# The job is described by the environment; the defaults are one machine with all of its GPUs:
#   LAUNCHER       torchrun (default), deepspeed, or none for a single process
#   NUM_NODES      machines, 1
#   NODE_RANK      number of this machine; default: the one Slurm gives, or 0
#   MASTER_ADDR    name of machine 0; default: the first one of the Slurm job, or 127.0.0.1
#   MASTER_PORT    default: follows from the Slurm job, so that two jobs on one machine do not meet, or 29500
#   PROCESSES      processes per machine; default: its GPUs, or 1
#   DRY_RUN        1 prints the command and runs nothing
# shellcheck shell=bash

fail() {
    echo "error: $*" >&2
    exit 2
}

count_devices() {
    local count=0
    if command -v nvidia-smi >/dev/null; then
        count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    fi
    echo $((count > 0 ? count : 1))
}

# Print the command so that it can be pasted into a shell, then become it.
show_and_run() {
    printf '%q ' "$@"
    echo
    if [ "${DRY_RUN:-0}" != 1 ]; then
        exec "$@"
    fi
}

# Run the step of a batch script of Slurm whose header says --signal=B:USR1@180: three minutes before the time limit Slurm signals the
# script alone, which lets the step save and queues the job again. A job that is cancelled is not queued again.
run_step() {
    printf '%q ' "$@"
    echo
    [ "${DRY_RUN:-0}" != 1 ] || return 0
    local warned=0 code=0
    trap 'warned=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
    "$@" &
    # a signal ends `wait` before the step does
    while wait $! && code=0 || code=$?; kill -0 $! 2>/dev/null; do :; done
    if [ "$warned" = 1 ] && [ "$code" != 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}

# In a batch script of Slurm that nobody has spread over its machines yet.
in_batch_script() {
    [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ] && [ -z "${NODE_RANK:-}" ]
}

launch() {
    local nodes=${NUM_NODES:-1} rank=${NODE_RANK:-${SLURM_NODEID:-0}} address=${MASTER_ADDR:-} port=${MASTER_PORT:-}
    local processes=${PROCESSES:-$(count_devices)}
    if [ -z "$address" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    fi
    address=${address:-127.0.0.1}
    if [ -z "$port" ]; then
        port=29500
        [ -z "${SLURM_JOB_ID:-}" ] || port=$((20000 + SLURM_JOB_ID % 20000))
    fi
    # a signal reaches the processes through torchrun, which then waits this long for their checkpoint
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}
    if in_batch_script && [ "${LAUNCHER:-torchrun}" = torchrun ]; then
        # the number of a machine is known on that machine only
        # shellcheck disable=SC2016
        run_step srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c 'exec torchrun --node-rank "$SLURM_NODEID" "$@"' torchrun \
            --nnodes "$nodes" --nproc-per-node "$processes" --master-addr "$address" --master-port "$port" --no-python "$@"
        return
    fi
    case ${LAUNCHER:-torchrun} in
        none)
            show_and_run "$@"
            ;;
        torchrun)
            show_and_run torchrun --nnodes "$nodes" --node-rank "$rank" --nproc-per-node "$processes" \
                --master-addr "$address" --master-port "$port" --no-python "$@"
            ;;
        deepspeed)
            local several=()
            if [ "$nodes" -gt 1 ]; then
                [ -n "${HOSTFILE:-}" ] || fail "HOSTFILE: not set for $nodes machines; give a file with a line 'host slots=N' for each"
                several=(--hostfile "$HOSTFILE" --no_ssh --node_rank "$rank")
            fi
            show_and_run deepspeed "${several[@]}" --num_nodes "$nodes" --num_gpus "$processes" \
                --master_addr "$address" --master_port "$port" --no_python --no_local_rank "$@"
            ;;
        *)
            fail "LAUNCHER: '$LAUNCHER' is unknown; use torchrun, deepspeed or none"
            ;;
    esac
}
