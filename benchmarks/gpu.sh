#!/usr/bin/env bash
# Tests and benchmarks that need GPUs, each under its own time limit; results go to OUT (default benchmarks/results).
#
#   benchmarks/gpu.sh tests        kernels against float64, every mask kind               4 minutes on an H100 with pytest-xdist, else 15
#   benchmarks/gpu.sh attention    the kernels beside their peers: table, JSON, plot      7 minutes
#   benchmarks/gpu.sh ring         one rank's share of rings: table, JSON, plot           3 minutes
#   benchmarks/gpu.sh sanitizer    memcheck and racecheck on small sizes                  1 minute
#   benchmarks/gpu.sh steps        steps of 131072 tokens, causal and packed, by memory setting, beside its peers      6 minutes
#   benchmarks/gpu.sh longest      one step of 1048576 tokens of a 0.6B model, in the background: 15 minutes on an H200 of 128 GiB host memory
#   benchmarks/gpu.sh training     10 steps of a 0.5B model at 131072 tokens, causal      5 minutes; on every GPU there is
#   benchmarks/gpu.sh between      several GPUs: the ring itself, and tests               7 minutes
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
mkdir -p "$out"
case ${1:-} in
tests)
    # Most of it is compiling, which workers share where pytest-xdist is installed.
    workers=()
    if python3 -c "import xdist" 2> /dev/null; then workers=(-n "${WORKERS:-6}"); fi
    timeout 1200 python3 -m pytest -m gpu "${workers[@]}" -p no:cacheprovider --tb=short \
        tests/kernels tests/ring tests/fused tests/test_offload.py tests/training/optimizers/test_host_adamw.py
    ;;
attention)
    timeout 540 python3 benchmarks/attention.py --out "$out" "${@:2}"
    ;;
ring)
    timeout 480 python3 benchmarks/ring.py --out "$out" "${@:2}"
    ;;
sanitizer)
    # racecheck reports two hazards, one in Triton's own dispatch of warp groups: docs/log.md.
    for tool in memcheck racecheck; do
        timeout 120 compute-sanitizer --tool "$tool" python3 -m pytest -m gpu -p no:cacheprovider \
            tests/kernels/test_gpu.py -k "written or (strided and hopper)" | tee "$out/$tool.txt"
    done
    ;;
steps)
    timeout 540 python3 benchmarks/training.py --out "$out/training.json" --variant ringflash: --variant host:memory=host \
        --variant "host-bf16:memory=host memory.optimizer_states=bf16" --variant transformers --variant deepspeed "${@:2}"
    ;;
longest)
    echo "benchmarks/longest.py runs in the background; its output is in $out/longest.txt"
    setsid nohup timeout 1500 python3 benchmarks/longest.py --out "$out/longest.json" "${@:2}" > "$out/longest.txt" 2>&1 &
    ;;
training)
    # Documents of more than 131072 bytes, so that every sequence is one causal document: the most work there can be.
    text=$(mktemp -d)
    python3 - "$text" <<'PY'
import pathlib, sys, sysconfig
source = "\n".join(p.read_text(errors="ignore") for p in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
for i in range(4):
    (pathlib.Path(sys.argv[1]) / f"{i}.txt").write_text(source[i * 1_000_000 : (i + 1) * 1_000_000])
PY
    timeout 360 python3 launch/local.py experiment=qwen3-0.5b-128k optim.steps=10 optim.warmup=2 data=text "data.path=$text" \
        "data.cache=$text/cache" data.held_out=0.25 "output_dir=$text/runs" evaluation.every=0 evaluation.sequences=1 \
        checkpoint.every=0 logger.mode=disabled "${@:2}" || exit 1
    cp "$text"/runs/*/metrics.jsonl "$out/training.jsonl"
    cat "$out/training.jsonl"
    ;;
between)
    gpus=$(python3 -c "import torch; print(torch.cuda.device_count())")
    timeout 300 torchrun --nproc-per-node "$gpus" benchmarks/ring.py --between --out "$out" "${@:2}" || exit 1
    timeout 480 python3 -m pytest -m gpu -p no:cacheprovider --tb=short tests/ring/test_gpus.py tests/training/test_gpus.py
    ;;
*)
    sed -n '2,11s/^# \?//p' "$0"
    exit 2
    ;;
esac
