#!/usr/bin/env bash
# Train on a Slurm cluster: one torchrun per node, one process per GPU.
#
#   sbatch launch/slurm.sh experiment=qwen3-0.5b-128k
#   sbatch --nodes 4 launch/slurm.sh experiment=... resume=auto
#
# Ten minutes before the time limit, and when the job is preempted, the run writes a checkpoint and ends, and the job is
# queued again. A job that Slurm restarts continues from the newest checkpoint. A rank that fails ends the job.
#
#   sbatch --signal=USR1@1800 ...           more time, where a step and a checkpoint take longer
#   LOGS=logs sbatch ...                    a log per rank in logs/NODE, beside slurm-JOB.out
#   SRUN="--container-image=IMAGE --container-mounts=$PWD:$PWD" sbatch ...    options for srun, here those of Pyxis
#SBATCH --job-name=ringflash
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
if [[ -z ${SLURM_JOB_NODELIST:-} || ${1:-} =~ ^(-h|--help)$ ]]; then
    sed -n '2,/^#SBATCH/s/^# \?//p' "$0" | grep -v ^SBATCH
    [[ ${1:-} =~ ^(-h|--help)$ ]] && exit 0 || exit 2
fi
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ -x launch/torchrun.sh ] || { echo "launch/slurm.sh: $PWD is no checkout of ringflash: submit the job from one" >&2; exit 2; }
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}  # with a pipe to head(1), scontrol may end by SIGPIPE
export NNODES=$SLURM_NNODES HEAD=$head:$((20000 + SLURM_JOB_ID % 20000)) RDZV_ID=$SLURM_JOB_ID
export RINGFLASH_STOPPED=$PWD/.slurm-$SLURM_JOB_ID.stopped  # which the ranks leave if they stop before the last step
rm -f "$RINGFLASH_STOPPED"
trap 'rm -f "$RINGFLASH_STOPPED"; exit 143' TERM  # of scancel: the job is not to be queued again
resume=()
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || resume=(resume=auto)
# srun does not inherit --cpus-per-task from sbatch. SRUN is split into words.
# shellcheck disable=SC2086
srun --kill-on-bad-exit=1 --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" ${SRUN:-} \
    "$PWD/launch/torchrun.sh" "${SLURM_GPUS_ON_NODE:-1}" "$@" "${resume[@]}" && code=0 || code=$?
if [ -e "$RINGFLASH_STOPPED" ]; then  # its checkpoint is written, even if a node failed afterwards
    rm -f "$RINGFLASH_STOPPED"
    echo "launch/slurm.sh: job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit "$code"
