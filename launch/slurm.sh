#!/usr/bin/env bash
# Train on a Slurm cluster: one torchrun per node, one process per GPU.
#
#   sbatch launch/slurm.sh experiment=qwen3-0.5b-128k
#   sbatch --nodes 4 launch/slurm.sh experiment=... resume=auto
#
# A rank that fails ends the job. With resume=auto, the same command continues from the newest checkpoint, also when
# Slurm requeues the job.
#SBATCH --job-name=ringflash
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
set -euo pipefail
if [[ -z ${SLURM_JOB_NODELIST:-} || ${1:-} =~ ^(-h|--help)$ ]]; then
    sed -n '2,/^#SBATCH/s/^# \?//p' "$0" | grep -v ^SBATCH
    [[ ${1:-} =~ ^(-h|--help)$ ]] && exit 0 || exit 2
fi
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export PATH="$PWD/.venv/bin:$PATH"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}  # with a pipe to head(1), scontrol may end by SIGPIPE
port=$((20000 + SLURM_JOB_ID % 20000))
exec srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID" train.py "$@"
