#!/usr/bin/env bash
# Train one model on several machines: the same command on each of them. Where they are is said by the scheduler (in a job of Slurm),
# by --hosts, or by the variables of ../lib.sh (NUM_NODES, NODE_RANK, MASTER_ADDR):
#   launchers/mdm_scaling/mdm_multi_node.sh --hosts first,second --objective mdm --preset 117M --tokenizer gpt2 --data corpora/c4 --flops 1e19
# The first host is where processes meet, at a port that follows from the command. A machine finds its number by its name, or has NODE_RANK.
# Settings of NCCL are passed on as they are.
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launchers/lib.sh
source "$folder/../lib.sh"

if [ "${1:-}" = --hosts ]; then
    [ -n "${2:-}" ] || fail "hosts: no machine named; give --hosts first,second"
    IFS=, read -r -a hosts <<<"$2"
    port=$(printf '%s ' "$@" | cksum | cut -d ' ' -f 1)
    shift 2
    export NUM_NODES=${#hosts[@]} MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}} MASTER_PORT=${MASTER_PORT:-$((20000 + port % 20000))}
    for number in "${!hosts[@]}"; do
        case ${hosts[number]} in
            "$(hostname)" | "$(hostname -s)") export NODE_RANK=${NODE_RANK:-$number} ;;
        esac
    done
    [ -n "${NODE_RANK:-}" ] || fail "hosts: $(hostname) is none of ${hosts[*]}; name it as 'hostname' does, or set NODE_RANK"
elif [ -n "${SLURM_JOB_NUM_NODES:-}" ]; then
    export NUM_NODES=$SLURM_JOB_NUM_NODES
fi
exec bash "$folder/mdm_single_node.sh" "$@"
