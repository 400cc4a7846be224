"""The ring: what it costs a GPU beyond its kernels, what it costs in precision, and where its GPUs would wait.

    python benchmarks/ring.py --device cpu --quick                   # any machine, a minute: does it work here
    python benchmarks/ring.py --timeline --tflops 500                # any machine, seconds: 128k tokens on 8 ranks
    python benchmarks/ring.py --timeline --tflops 650/550 --gbps 50 --mask window 4096 --layout contiguous --ranks 16
    python benchmarks/ring.py --error --device cpu                   # any machine, a minute
    python benchmarks/ring.py                                        # a GPU, all cases, under 8 minutes
    python benchmarks/ring.py --error                                # a GPU, under 4 minutes
    python benchmarks/ring.py --timeline --gbps 400                  # a GPU: the kernel's speed is measured here
    torchrun --nproc-per-node 2 benchmarks/ring.py --between         # two or more GPUs: the ring itself, 3 minutes

Without a mode: efficiency. One rank's forward and backward run on one device without its neighbours. Their time is
compared with the rank's share of one causal call over all tokens by the same kernel (benchmarks/ring_share.py). All
ranks are timed, interleaved with the whole call; of a ring of more than 8, the 8 with the most work are. Their messages
are there before they start; for the row "slowest with copies", the GPU copies every message meanwhile. Before that, all
ranks of a small ring are compared with float64. A ring that is wrong is marked WRONG and not timed, and the exit code
is 1.

--error: error of out, dq, dk and dv against float64 at 1 to 32 ranks, for this ring and for rings that round to 16 bits
what they merge or send (benchmarks/ring_error.py). The exit code is 1 if ringflash's error grows with the ring or
exceeds the bound.

--timeline: compute and transfer of every rank and hop of one layer's attention, predicted from what ring_attention
does and from the speed of kernel and link (benchmarks/ring_timeline.py). 400 GB/s each way is NVLink on Hopper, 50
InfiniBand NDR. The kernel's speed is --tflops FORWARD/BACKWARD, or measured on a causal sequence of up to 32k tokens.

--between: the ring itself, one rank per GPU that torchrun started a process for, beside the same ranks without
transfers and PyTorch's context_parallel. Rings larger than the number of GPUs are emulated: each GPU runs one rank with
its full traffic (benchmarks/ring_between.py). ring-between-....png shows what every GPU ran.

--length, --ranks, --heads, --dim, --mask, --layout choose one case instead of all of them. --mask is `causal`, `full`,
`window 4096` or `packed 64`, which is 64 documents of lognormal lengths. --out (benchmarks/results) gets
ring-DEVICE.json and .png, ring-error-..., ring-timeline-...; the last line printed is the summary in JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import report, ring_between, ring_error, ring_share, ring_timeline, timing
from benchmarks.options import DTYPES, parse, shared_parser
from benchmarks.ring_cases import RingCase
from ringflash import kernels
from ringflash.layout import LAYOUT_NAMES
from ringflash.ring.simulation import Span

GPU_CASES = (
    RingCase.of("128k", 8),
    RingCase.of("64k", 8),
    RingCase.of("128k", 16),
    RingCase.of("128k", 4),
    *(RingCase.of("128k", 8, "packed", layout=layout) for layout in ("zigzag", "striped", "balanced")),
)
CPU_CASES = (
    RingCase.of("2k", 8, heads=(8, 2), dim=64),
    RingCase.of("2k", 8, "packed", heads=(8, 2), dim=64, packed=16),
)
CPU_QUICK = tuple(dataclasses.replace(case, length=512, heads=4, ranks=4, packed=8) for case in CPU_CASES)
# The case of --error, by device and --quick.
ERROR_CASES = {
    ("cuda", False): RingCase.of("8k", 1, heads=(8, 2)),
    ("cuda", True): RingCase.of("2k", 1, heads=(8, 2)),
    ("cpu", False): RingCase.of("4k", 1, heads=(4, 2), dim=64),
    ("cpu", True): RingCase.of(512, 1, heads=(4, 2), dim=32),
}
TIMELINE = RingCase.of("128k", 8)
TIMELINE_QUICK = dataclasses.replace(TIMELINE, length=8192, ranks=4)
# The cases of --between; ranks=1 stands for as many as there are GPUs.
BETWEEN = (
    RingCase.of("128k", 1),
    RingCase.of("32k", 1),
    RingCase.of("128k", 1, "packed", layout="balanced"),
    RingCase.of("128k", 8),
    RingCase.of("64k", 8),
    RingCase.of("128k", 8, "packed", layout="balanced"),
)
SPEED_LENGTH = 32768  # tokens of the causal call whose speed a timeline takes


def efficiency(options: argparse.Namespace, device: torch.device, facts: dict[str, str]) -> int:
    """Mode 1: one rank's share of each case."""
    listed = {("cuda", False): GPU_CASES, ("cuda", True): GPU_CASES[1:2], ("cpu", False): CPU_CASES}
    cases = [options.case] if options.case else list(listed.get((device.type, options.quick), CPU_QUICK))
    file = options.out / f"ring-{report.slug(device)}.json"
    shares: list[ring_share.Share] = []
    for case in cases:
        share = ring_share.measure(case, options.kernel, DTYPES[options.dtype], device, options.seconds)
        print(ring_share.table(share, header=not shares) + "\n", flush=True)
        shares.append(share)
        rows = [dataclasses.asdict(s) | {"efficiency": s.summary()} for s in shares]
        report.write_json(file, {"benchmark": "ring", "card": facts, "dtype": options.dtype, "rows": rows})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    title = f"{options.dtype}, {report.signature(facts)}"
    report.print_written(file, report.drawn(ring_share.draw, file, shares, title))
    wrong = [f"{s.status}: {s.case}: {s.reason}" for s in shares if s.status != "timed"]
    return _closed("ring", facts, wrong, {"efficiency": {s.case: s.summary() for s in shares}})


def error(options: argparse.Namespace, device: torch.device, facts: dict[str, str]) -> int:
    """Mode 2: error against ring size."""
    case = options.case or ERROR_CASES[device.type, options.quick]
    described = case.described().replace(f"/{case.ranks} ", " tokens, ", 1)
    sizes = [size for size in ring_error.SIZES if 2 * size <= case.length]
    found, bound = ring_error.measure(case, sizes, options.kernel, device)
    print(ring_error.table(found, bound), end="\n\n")
    wrong = ring_error.wrong(found, bound)
    file = options.out / f"ring-error-{report.slug(device)}.json"
    grown = {ring: ring_error.growth(found, ring) for ring in ring_error.RINGS}
    contents = {"benchmark": "ring error", "card": facts, "case": described, "bound": bound}
    report.write_json(file, contents | {"rows": [dataclasses.asdict(row) for row in found], "growth": grown})
    title = f"error against ring size: {described}, bf16 inputs\n{report.signature(facts)}"
    report.print_written(file, report.drawn(ring_error.draw, file, found, bound, title))
    rounded = {ring: {name: round(x, 3) for name, x in by.items()} for ring, by in grown.items()}
    return _closed("ring error", facts, wrong, {"growth": rounded})


def timeline(options: argparse.Namespace, device: torch.device, facts: dict[str, str]) -> int:
    """Mode 3: the predicted timeline of every rank."""
    case = options.case or (TIMELINE_QUICK if options.quick else TIMELINE)
    if options.tflops is None:
        forward, backward = measured_tflops(case, options, device)
        source = f"measured on {facts['device']}, {options.dtype}"
    else:
        (forward, backward), source = options.tflops, "given"
    speed = ring_timeline.Speed.of(forward, backward, case.head_dim, options.gbps)
    passes = ring_timeline.schedules(case)
    predicted = ring_timeline.predict(case, speed, passes)
    enough = ring_timeline.sufficient_link(case, speed, passes) / 1e9
    subtitle = f"kernel {forward:.3g} TFLOP/s forward, {backward:.3g} backward ({source}); numbers are hops"
    print(ring_timeline.heading(predicted), subtitle, "", ring_timeline.table(predicted), "", sep="\n")
    print(f"links of {enough:.3g} GB/s or more cost under 1% of the time\n")
    file = options.out / f"ring-timeline-{report.slug(device)}.json"
    found = predicted.summary() | {"tflops": [forward, backward], "gbps": options.gbps, "sufficient_gbps": enough}
    spans = {name: simulated.spans for name, simulated in predicted.passes.items()}
    contents = {"benchmark": "ring timeline", "card": facts, "case": case.described(), "speed": source}
    report.write_json(file, contents | {"found": found, "spans": {"fields": Span._fields, **spans}})
    title = f"{ring_timeline.heading(predicted)}\n{subtitle}; {facts['date']}, {facts['commit']}"
    report.print_written(file, report.drawn(ring_timeline.draw, file, predicted, title))
    rounded = {name: round(x, 4) if isinstance(x, float) else x for name, x in found.items()}
    return _closed("ring timeline", facts, [], {"predicted": rounded})


def many(gpus: int) -> list[RingCase]:
    """The cases of benchmarks/many_gpus.sh for a number of GPUs.

    8k, 16k and 64k tokens per GPU, causal and packed; then the shape of MagiAttention's published benchmark, 64 query
    and 8 KV heads and 8k tokens per GPU, its packed documents of at most a quarter of the pack.
    """
    lengths = [f"{tokens * gpus}k" for tokens in (8, 16, 64)]
    kinds: tuple[dict[str, Any], ...] = ({}, {"kind": "packed", "layout": "balanced"})
    ours = [RingCase.of(length, gpus, **kind) for length in lengths for kind in kinds]
    return ours + [RingCase.of(lengths[0], gpus, heads=(64, 8), **kind) for kind in kinds]


def between(options: argparse.Namespace, device: torch.device, facts: dict[str, str]) -> int:
    """Mode 4: the ring between GPUs."""
    from ringflash.distributed.parallel import ParallelConfig  # transformers, which no other mode needs
    from ringflash.distributed.world import join

    world = join(ParallelConfig())
    listed = BETWEEN[1:2] if options.quick else BETWEEN
    cases = (
        [options.case]
        if options.case
        else many(world.size)
        if options.many
        else [dataclasses.replace(case, ranks=world.size) if case.ranks == 1 else case for case in listed]
    )
    file = options.out / f"ring-between-{report.slug(device)}.json"
    of_run = (options.kernel, DTYPES[options.dtype], world.device, world.ring.group)
    found: list[ring_between.Between] = []
    for case in cases:
        found.append(ring_between.measure(case, *of_run, options.seconds))
        torch.cuda.empty_cache()
        if world.is_first:
            print(ring_between.table(found[-1], header=len(found) == 1) + "\n", flush=True)
    rows = [dataclasses.asdict(row) | {"efficiency": row.summary()} for row in found]
    contents = {"benchmark": "ring between GPUs", "card": facts, "rows": rows}
    if world.is_first:  # the measurements are kept even if drawing fails
        report.write_json(file, contents)
    for case, row in zip([] if options.many else cases, [] if options.many else rows, strict=True):
        ran = ring_between.profiled(case, *of_run)
        row["hidden"] = {direction: round(ring_between.hidden(spans), 4) for direction, spans in ran.items()}
        if world.is_first:
            print(f"{case}: share of the transfers' time under attention kernels: {row['hidden']}", flush=True)
            picture = file.with_name(f"{file.stem}-{re.sub('[^a-z0-9]+', '-', str(case))}.png")
            title = f"{case}, {options.dtype}, {world.size} x {report.signature(facts)}"
            report.drawn(ring_between.draw, picture, ran, title)
    if world.is_first:
        report.write_json(file, contents)
        print(f"wrote {file}" + ("" if options.many else " and a picture of each case"))
        _closed("ring between GPUs", facts, [], {"efficiency": {row.case: row.summary() for row in found}})
    world.watchdog.close()
    dist.destroy_process_group()
    return 0


def measured_tflops(case: RingCase, options: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """The kernel's speed forward and backward on one device, on a causal case of this shape."""
    whole = dataclasses.replace(case.whole(), length=min(case.length, SPEED_LENGTH))
    ring = ring_share.OneRank(1, 0, device)
    inputs = whole.inputs(DTYPES[options.dtype], device)
    both = ring_share.passes(whole.plan(ring), inputs, options.kernel)
    runs = dict(zip(("forward", "backward"), both, strict=True))
    speeds = []
    for direction, took in timing.interleaved(runs, device, options.seconds).items():
        if isinstance(took, Exception):
            raise took
        speeds.append(whole.flops(direction) / took.ms / 1e9)
    return speeds[0], speeds[1]


def _closed(benchmark: str, facts: dict[str, str], wrong: list[str], found: dict[str, Any]) -> int:
    """Print what is wrong, then the summary. Returns the exit code."""
    print("".join(f"{line}\n" for line in wrong), end="")
    print(json.dumps({"benchmark": benchmark, "device": facts["device"], "wrong": wrong} | found))
    return 1 if wrong else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = shared_parser(__doc__, seconds=1.0)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--error", action="store_const", dest="mode", const=error, help="error against ring size")
    mode.add_argument(
        "--timeline", action="store_const", dest="mode", const=timeline, help="predicted timeline of a layer"
    )
    mode.add_argument("--between", action="store_const", dest="mode", const=between, help="the ring between GPUs")
    parser.add_argument("--many", action="store_true", help="with --between: the cases of benchmarks/many_gpus.sh")
    parser.add_argument("--quick", action="store_true", help="one small case; on the CPU, tiny ones")
    parser.add_argument("--kernel", default="auto", choices=("auto", *kernels.FASTEST_FIRST), help="(%(default)s)")
    parser.add_argument("--length", help="tokens, such as 131072 or 128k")
    parser.add_argument("--ranks", type=int, help="of the ring")
    parser.add_argument("--heads", help="query and KV heads, such as 32/8")
    parser.add_argument("--dim", type=int, help="of a head")
    parser.add_argument(
        "--mask", nargs="+", metavar=("MASK", "SIZE"), help="causal, full, window SIZE, packed DOCUMENTS"
    )
    parser.add_argument("--layout", choices=LAYOUT_NAMES, help="which rank holds which tokens")
    parser.add_argument("--tflops", help="the kernel's speed, FORWARD/BACKWARD or one number for both")
    parser.add_argument("--gbps", type=float, default=400.0, help="GB/s of each rank's link, each way (%(default)g)")
    options = parse(parser, arguments)
    if options.mode is timeline and options.tflops is None and options.device == "cpu":
        parser.error("--timeline on the CPU needs the speed of a GPU's kernel, such as --tflops 650/550")
    for name in ("gbps", "seconds"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name} must be above 0, got {getattr(options, name)}")
    if options.many and options.mode is not between:
        parser.error("--many needs --between")
    if options.mode is between and (options.device == "cpu" or int(os.environ.get("WORLD_SIZE", "1")) < 2):
        parser.error("--between needs two GPUs or more: torchrun --nproc-per-node 2 benchmarks/ring.py --between")
    options.mode = options.mode or efficiency
    try:
        if options.tflops is not None:
            options.tflops = _two_numbers(options.tflops, float, "--tflops")
        options.case = _case(options)
    except ValueError as reason:
        parser.error(str(reason))
    return options


def _case(options: argparse.Namespace) -> RingCase | None:
    """The case that the options describe, or None if the mode's own cases are to run."""
    given = (options.length, options.ranks, options.heads, options.dim, options.mask, options.layout)
    if all(option is None for option in given):
        return None
    for name in ("ranks", "dim"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ValueError(f"--{name} must be 1 or more, got {number}")
    if options.length is not None and not re.fullmatch("[1-9][0-9]*[kM]?", options.length):
        raise ValueError(f"--length {options.length} is not a number of tokens, such as 131072 or 128k")
    kind, *size = options.mask or ["causal"]
    if len(size) > 1 or (size and (kind not in ("window", "packed") or not re.fullmatch("[1-9][0-9]*", size[0]))):
        raise ValueError(f"--mask {' '.join(options.mask)} is not causal, full, window SIZE or packed DOCUMENTS")
    sized = {kind: int(size[0])} if size else {}
    base = ERROR_CASES[options.device, options.quick] if options.mode is error else TIMELINE
    heads = _two_numbers(options.heads, int, "--heads") if options.heads else (base.heads, base.kv_heads)
    return RingCase.of(
        options.length or base.length, options.ranks or base.ranks, kind, heads, options.dim or base.head_dim,
        layout=options.layout or base.layout, **sized,
    )  # fmt: skip


def _two_numbers(text: str, number: type, name: str) -> tuple[Any, Any]:
    """ "32/8", or "8" for both."""
    parts = text.split("/")
    try:
        first, second = map(number, parts * 2 if len(parts) == 1 else parts)
    except ValueError:
        raise ValueError(f"{name} {text} is not a number, or two as in 32/8") from None
    if not all(0 < x < math.inf for x in (first, second)):
        raise ValueError(f"{name} must be above 0, got {text}")
    return first, second


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code: 1 if the ring is wrong."""
    options = _options(arguments)
    device = torch.device(options.device)
    facts = report.card(device, {}, options.commit)
    if options.mode is not between or os.environ["RANK"] == "0":
        print(report.card_line(facts), "", sep="\n")
    return options.mode(options, device, facts)


if __name__ == "__main__":
    sys.exit(main())
