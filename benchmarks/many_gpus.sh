#!/usr/bin/env bash
# What to run first on a host with several GPUs: 11 minutes in all. Tables are printed; results go to OUT (default benchmarks/results).
#
#   benchmarks/many_gpus.sh                all four parts, one after the other; or one of them:
#   benchmarks/many_gpus.sh correct        rings, Ulysses, replicas, LoRA, DPO and resumed runs against one GPU        5 minutes
#   benchmarks/many_gpus.sh efficiency     8k, 16k and 64k tokens per GPU, and a published benchmark's shape, with peers        2 minutes
#   benchmarks/many_gpus.sh training       steps of a 0.6B and an 8B shape, by length                        2 minutes
#   benchmarks/many_gpus.sh failures       one rank killed, one rank stopped: what is printed, and when       2 minutes
#
# GPUS=N takes the first N GPUs. LENGTHS="131072 262144" are lengths for `training` (131072 by default); longer ones take longer.
# `correct` needs pytest: pip install -c constraints.txt '.[train,dev]'.
# The minutes of `efficiency` are those of two H200; the others are estimates.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/benchmarks/results} PATH="$PWD/.venv/bin:$PATH"
[ $# -gt 0 ] || set -- correct efficiency training failures
for part in "$@"; do
    [[ $part =~ ^(correct|efficiency|training|failures)$ ]] || { sed -n '2,12s/^# \?//p' "$0"; exit 2; }
done
here=$(python3 -c "import torch; print(torch.cuda.device_count())") || exit 2
gpus=${GPUS:-$here}
if ! [[ $gpus =~ ^[0-9]+$ ]] || [ "$gpus" -lt 2 ] || [ "$gpus" -gt "$here" ]; then
    echo "benchmarks/many_gpus.sh needs two GPUs or more: GPUS=$gpus, and torch sees $here" >&2
    exit 2
fi
CUDA_VISIBLE_DEVICES=$(cut -d, -f "1-$gpus" <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((here - 1)))}")
export CUDA_VISIBLE_DEVICES
mkdir -p "$OUT" || exit 2
ranks=(torchrun --standalone --nproc-per-node "$gpus")
failed=()
limited() {  # SECONDS COMMAND...; it is in a separate process group, which Ctrl-C does not reach
    timeout "$@" &
    wait "$!"
}
trap '[ -z "${!:-}" ] || { kill "$!"; wait "$!"; } 2> /dev/null; exit 130' INT TERM
for part in "$@"; do
    echo "== $part, $gpus GPUs"
    case $part in
    correct)
        tests=(tests/ring/test_gpus.py tests/training/test_gpus.py)
        limited 480 python3 -m pytest -m gpu -q -p no:cacheprovider --tb=short -k "not that_hangs" "${tests[@]}"
        ;;
    efficiency)
        limited 240 "${ranks[@]}" benchmarks/ring.py --between --many --seconds 0.3 --out "$OUT"
        ;;
    training)
        for tokens in ${LENGTHS:-131072}; do
            shape="model.architecture.vocab_size=128256 model.architecture.max_position_embeddings=$tokens"
            limited 200 "${ranks[@]}" benchmarks/training.py --out "$OUT/training-$gpus.json" \
                --tokens "$tokens" --warm 32768 --batches 1 "parallel.ring=$gpus" --variant qwen3-0.6b: \
                --variant "llama3-8b:experiment=llama3-8b-128k memory=long $shape" ||
                failed+=("training at $tokens tokens")
        done
        ;;
    failures)
        limited 200 python3 benchmarks/failures.py --ranks "$gpus" --out "$OUT/failures.json"
        ;;
    esac || failed+=("$part")
done
[ ${#failed[@]} -eq 0 ] || { printf '== failed: %s\n' "${failed[@]}" >&2; exit 1; }
