#!/usr/bin/env bash
# Train with torchrun, one process per GPU.
#
#   launch/torchrun.sh RANKS_PER_MACHINE key=value ...
#
# One machine:       launch/torchrun.sh 8 experiment=qwen3-0.5b-128k
# Several machines:  NNODES=4 HEAD=first-machine:29500 launch/torchrun.sh 8 experiment=...     (the same on each)
# A log per rank:    LOGS=folder launch/torchrun.sh 8 ...     (folder/RUN/attempt_0/LOCAL_RANK/stderr.log, per machine)
#
# SIGUSR1 or SIGTERM to this script lets the run finish its step, write a checkpoint and end with exit code 75. Ctrl-C, or
# SIGTERM again, ends it at once.
set -euo pipefail
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \?//p}' "$0"
    [[ ${1:-} =~ ^(-h|--help)$ ]] && exit 0 || exit 2
fi
ranks=$1
shift
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
if [ "${NNODES:-1}" != 1 ]; then
    [ -n "${HEAD:-}" ] || { echo "launch/torchrun.sh: NNODES=$NNODES needs HEAD=first-machine:port, on each machine" >&2; exit 2; }
    echo "launch/torchrun.sh: waits until NNODES=$NNODES machines have come to HEAD=$HEAD" >&2
fi
logs=()
[ -z "${LOGS:-}" ] || logs=(--log-dir "$LOGS/$(hostname)" --tee 3)
exec python launch/with_signals.py torchrun --nproc-per-node "$ranks" --nnodes "${NNODES:-1}" "${logs[@]}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id "${RDZV_ID:-ringflash}" \
    train.py "$@"
