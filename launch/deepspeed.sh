#!/usr/bin/env bash
# Train with DeepSpeed's launcher, one process per GPU.
#
#   launch/deepspeed.sh RANKS_PER_MACHINE key=value ...
#
# One machine:       launch/deepspeed.sh 8 experiment=qwen3-0.5b-128k
# Several machines:  HOSTFILE=hosts launch/deepspeed.sh 8 experiment=...      (hosts: a line "name slots=8" for each)
#
# On one machine, SIGUSR1 or SIGTERM to this script lets the run finish its step, write a checkpoint and end with exit code
# 75. Ctrl-C, or SIGTERM again, ends it at once.
set -euo pipefail
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,/^set/s/^# \?//p' "$0"
    [[ ${1:-} =~ ^(-h|--help)$ ]] && exit 0 || exit 2
fi
ranks=$1
shift
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
hosts=()
[ -z "${HOSTFILE:-}" ] || hosts=(--hostfile "$HOSTFILE")
# train.py reads its rank from the environment, so it needs no --local_rank.
exec python launch/with_signals.py deepspeed "${hosts[@]}" --num_gpus "$ranks" --no_local_rank train.py "$@"
