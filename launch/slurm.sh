#!/usr/bin/env bash
# sbatch launch/slurm.sh experiment=qwen3-0.5b-128k
# sbatch --nodes 4 launch/slurm.sh experiment=... resume=auto
#
# One torchrun a node, one rank a GPU. A rank that fails ends the job; with resume=auto the same command goes on from
# the newest checkpoint, also after a requeue.
#SBATCH --job-name=ringflash
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export PATH="$PWD/.venv/bin:$PATH"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
exec srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID" train.py "$@"
