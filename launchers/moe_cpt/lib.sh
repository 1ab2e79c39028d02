# Shared by the training scripts of moe-cpt. They set `root` and the variables of `train_mixture`, and call it with further options.
#
# Paths come from the environment:
#   MODEL     mixture to train, as written by moe-cpt convert
#   DATA      folder with one folder per source, packed or tokenised
#   VALID     held-out data, one file per source
#   OUT       run folder; default: outputs/<job name>-<job id>, where a requeued job goes on
#   COMMENT   what the run is for
# and so do the variables of ../lib.sh.
# shellcheck shell=bash
# the scripts set what is used here
# shellcheck disable=SC2154
# shellcheck source=launchers/lib.sh
source "$root/launchers/lib.sh"

# Keep beside the run what started it, and beside all runs which one was the latest: note_run FOLDER.
note_run() {
    local base
    base=$(dirname "$1")
    mkdir -p "$1"
    cp "$0" "$1/sbatch.sh"
    printf 'job: %s\ncommit: %s\nbranch: %s\ncomment: %s\n' "${SLURM_JOB_ID:-none}" "$(git -C "$root" rev-parse HEAD || true)" \
        "$(git -C "$root" rev-parse --abbrev-ref HEAD || true)" "${COMMENT:-}" >"$1/comment.txt"
    echo "${SLURM_JOB_ID:-none}" >"$base/latest.jobid"
    ln -sfn "$(basename "$1")" "$base/latest.dir"
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        ln -sfn "$PWD/logs/${SLURM_JOB_NAME:-}-$SLURM_JOB_ID.log" "$base/latest.log"
    fi
}

# shellcheck disable=SC2154
train_mixture() {
    local variable
    for variable in MODEL DATA VALID; do
        [ -n "${!variable:-}" ] || fail "$variable: not set; see launchers/moe_cpt/lib.sh for the paths that a script needs"
    done
    local batch=$((per_device_train_batch_size * gradient_accumulation_steps * num_nodes * num_gpu_per_node))
    local tokens=$((${num_tokens//^/**}))
    if [ "${DRY_RUN:-0}" = 1 ]; then
        # what the first lines of the log will say
        printf '# max_steps: %d\n# global batch size: %d\n# #tokens/batch: %d\n' $((tokens / (batch * block_size))) "$batch" $((batch * block_size))
    fi
    local run=${OUT:-outputs/${SLURM_JOB_NAME:-$(basename "$0" .sh)}-${SLURM_JOB_ID:-$(date +%Y%m%d-%H%M%S)}}
    [ "${DRY_RUN:-0}" = 1 ] || note_run "$run"
    local evaluations=()
    [ -z "${eval_steps:-}" ] || evaluations=(--eval_steps "$eval_steps")
    export OMP_NUM_THREADS=$omp_num_threads NUM_NODES=${NUM_NODES:-$num_nodes} PROCESSES=${PROCESSES:-$num_gpu_per_node}
    launch moe-cpt train --model_name_or_path "$MODEL" --dataset_dir "$DATA" --validation_dir "$VALID" --output_dir "$run" --resume auto \
        --num_nodes "$num_nodes" --num_gpu_per_node "$num_gpu_per_node" \
        --per_device_train_batch_size "$per_device_train_batch_size" --gradient_accumulation_steps "$gradient_accumulation_steps" \
        --block_size "$block_size" --num_tokens "$num_tokens" --learning_rate "$learning_rate" --final_lr_portion "$final_lr_portion" \
        --warmup_steps "$warmup_steps" "${evaluations[@]}" --save_steps "$save_steps" --logging_steps "$logging_steps" \
        --comment "${COMMENT:-}" --precision bf16 --deepspeed "$root/launchers/conf/deepspeed/bf16_zero1_default.json" "$@"
}
