#!/usr/bin/env bash
# One machine:       launch/torchrun.sh 8 experiment=qwen3-0.5b-128k
# Several machines:  NNODES=4 HEAD=first-machine:29500 launch/torchrun.sh 8 experiment=...     (the same on each)
set -euo pipefail
ranks=${1:?usage: launch/torchrun.sh RANKS_PER_MACHINE key=value ...}
shift
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
exec torchrun --nproc-per-node "$ranks" --nnodes "${NNODES:-1}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id "${RDZV_ID:-ringflash}" \
    train.py "$@"
