#!/usr/bin/env bash
# One machine:       launch/deepspeed.sh 8 experiment=qwen3-0.5b-128k
# Several machines:  HOSTFILE=hosts launch/deepspeed.sh 8 experiment=...      (hosts: a line "name slots=8" for each)
set -euo pipefail
ranks=${1:?usage: launch/deepspeed.sh RANKS_PER_MACHINE key=value ...}
shift
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
hosts=()
[ -z "${HOSTFILE:-}" ] || hosts=(--hostfile "$HOSTFILE")
# The environment tells train.py its rank; the --local_rank that the launcher would add is not needed.
exec deepspeed "${hosts[@]}" --num_gpus "$ranks" --no_local_rank train.py "$@"
