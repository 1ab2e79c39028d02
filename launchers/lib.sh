# Shared by the launcher scripts. Source it, then call `launch COMMAND ARGUMENTS...` with a package's public command.
#
# The job is described by the environment; the defaults are one machine with all of its GPUs:
#   LAUNCHER       torchrun (default), deepspeed, or none for a single process
#   NUM_NODES      machines, 1
#   NODE_RANK      number of this machine; default: the one Slurm gives, or 0
#   MASTER_ADDR    name of machine 0, 127.0.0.1
#   MASTER_PORT    29500
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

launch() {
    local nodes=${NUM_NODES:-1} rank=${NODE_RANK:-${SLURM_NODEID:-0}} address=${MASTER_ADDR:-127.0.0.1} port=${MASTER_PORT:-29500}
    local processes=${PROCESSES:-$(count_devices)}
    case ${LAUNCHER:-torchrun} in
        none)
            show_and_run "$@"
            ;;
        torchrun)
            # a signal reaches the processes through torchrun, which then waits this long for their checkpoint
            export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}
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
