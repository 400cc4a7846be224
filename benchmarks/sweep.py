"""Tile sizes of the portable kernels: all that fit, timed in interleaved rounds and listed best first.

    python benchmarks/attention.py --sweep forward

The forward is timed alone. dq and dkdv (dk and dv for heads above 128) are timed within the whole backward, whose other
kernels keep their table's tuning: only differences belong to the kernel, and TFLOP/s are those of the backward. Each
variant's result is compared with that of the table's choice. Variants are compiled in advance by several processes,
into Triton's cache on disk.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.cases import Case
from benchmarks.timing import Timing, interleaved

HEAD_DIMS = {
    "forward": (64, 128, 256, 512),
    "dq": (64, 128, 256, 512),
    "dkdv": (64, 128),
    "dk": (256, 512),
    "dv": (256, 512),
}
TARGETS = tuple(HEAD_DIMS)
SHAPE = "1,32,8,16k,{} causal"
SECONDS = 0.15  # of measuring, for each variant
COMPILED_AT = 512  # tokens: enough to compile what any length runs
TOLERANCE = 1e-2  # relative, to the table's choice: both round p to the inputs' dtype, tile by tile
BLOCKS, SHORT, WARPS, STAGES = (64, 128), (32, 64, 128), (4, 8), (1, 2, 3)  # rows of a program, rows of a step
SHORT_OF_LARGE = (16, 32, 64)  # of heads of 512


def main(targets: list[str], dtype: torch.dtype, device: torch.device, out: Path, facts: dict[str, str]) -> int:
    """Sweep, print and write attention-sweep-DEVICE.json. Returns the exit code: 1 if a variant is wrong."""
    jobs = [(target, Case.parse(SHAPE.format(head_dim))) for target in targets for head_dim in HEAD_DIMS[target]]
    compile_all(jobs, dtype, device)
    found: dict[str, list[dict]] = {}
    for target, case in jobs:
        found[f"{target} {case}"] = lines = sweep(target, case, dtype, device)
        print(f"{target}, {case}: {len(lines)} variants", *map(_line, lines), "", sep="\n", flush=True)
        contents = {"benchmark": "attention sweep", "card": facts, "variants": found}
        report.write_json(out / f"attention-sweep-{report.slug(device)}.json", contents)
    return int(any(str(line["reason"]).startswith("WRONG") for lines in found.values() for line in lines))


def sweep(target: str, case: Case, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Each variant of a kernel as {tuning, chosen, reason, ms, p20, p80, tflops}, best first, failures last."""
    chosen = _chosen(target, case.head_dim, dtype, device)
    variants = _variants(target, case.head_dim, chosen)
    run = _runner(target, case, dtype, device)
    usual = run(chosen)
    reasons, runs = {}, {}
    for variant in variants:
        try:
            reasons[str(variant)] = _difference(run(variant), usual)
        except Exception as error:  # shared memory or registers do not suffice
            reasons[str(variant)] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
        if reasons[str(variant)] is None:
            runs[str(variant)] = functools.partial(run, variant)
    times = interleaved(runs, device, SECONDS)
    lines = []
    for variant in variants:
        took, reason = times.get(str(variant)), reasons[str(variant)]
        line = {"tuning": asdict(variant), "chosen": variant == chosen, "reason": reason}
        if isinstance(took, Timing):
            flops = case.flops("forward" if target == "forward" else "backward")
            line |= {"ms": took.ms, "p20": took.p20, "p80": took.p80, "tflops": flops / took.ms / 1e9}
        elif took is not None:
            line["reason"] = repr(took)
        lines.append(line)
    return sorted(lines, key=lambda line: line.get("ms", float("inf")))


def _line(line: dict) -> str:
    tuning = " ".join(f"{name}={int(value)}" for name, value in line["tuning"].items())
    mark = "<- the table's" if line["chosen"] else ""
    if "ms" not in line:
        return f"  {tuning:<52} {line['reason']} {mark}"
    spread = f"{line['p20']:8.3f}..{line['p80']:.3f}"
    return f"  {tuning:<52} {line['ms']:8.3f} ms {spread} {line['tflops']:7.1f} TFLOP/s {mark}"


def _chosen(target: str, head_dim: int, dtype: torch.dtype, device: torch.device):
    from ringflash.kernels import portable_backward, portable_forward

    tables = {"forward": portable_forward.tuning_for, "dq": portable_backward.dq_tuning_for}
    major, minor = torch.cuda.get_device_capability(device)
    chosen = tables.get(target, portable_backward.dkdv_tuning_for)(head_dim, dtype, 10 * major + minor)
    return chosen[0 if target != "dv" else 1] if isinstance(chosen, tuple) else chosen


def _variants(target: str, head_dim: int, chosen) -> list:
    """The grid, with or without the copy engine as in the table, and the table's choice with the other setting."""
    grid = itertools.product(BLOCKS, SHORT if head_dim <= 256 else SHORT_OF_LARGE, WARPS, STAGES)
    of_keys = target in ("dkdv", "dk", "dv")
    variants = [
        replace(chosen, block_q=short if of_keys else long, block_k=long if of_keys else short, warps=w, stages=n)
        for long, short, w, n in grid
    ]
    if chosen.tma:
        variants.append(replace(chosen, tma=False))
    return [chosen, *(variant for variant in variants if variant != chosen)]


def _runner(target: str, case: Case, dtype: torch.dtype, device: torch.device) -> Callable:
    """run(tuning) -> the tensors it computed: out, or dq, dk and dv."""
    from ringflash.kernels import portable_backward, portable_forward

    q, k, v, dout = (x.detach() for x in case.inputs(dtype, device))
    intervals, scale = case.mask().intervals(device), case.head_dim**-0.5
    forward = functools.partial(portable_forward.forward, q, k, v, intervals, scale=scale, out=torch.empty_like(q))
    if target == "forward":
        return lambda tuning: (forward(tuning=tuning).out,)
    usual = {name: _chosen(name, case.head_dim, dtype, device) for name in ("dk", "dv") if case.head_dim > 128}
    state = forward()
    delta = (dout.float() * state.out.float()).sum(-1).transpose(1, 2).contiguous()

    def backward(tuning) -> tuple[Tensor, ...]:
        dq, dk, dv = (torch.zeros(x.shape, device=device) for x in (q, k, v))
        tunings = {"dq_tuning": tuning} if target == "dq" else {"dkdv_tuning": _of_keys(target, tuning, usual)}
        portable_backward.backward(
            dout, q, k, v, state.lse, delta, intervals, scale=scale, dq=dq, dk=dk, dv=dv, **tunings
        )  # fmt: skip
        return dq, dk, dv

    return backward


def _of_keys(target: str, tuning, usual: dict) -> tuple:
    """The tunings of dk and dv: one of both, or of each where one of them is changed."""
    return (tuning,) if target == "dkdv" else tuple((usual | {target: tuning}).values())


def _difference(result: tuple[Tensor, ...], usual: tuple[Tensor, ...]) -> str | None:
    worst = max(((x.float() - y.float()).norm() / y.float().norm()).item() for x, y in zip(result, usual, strict=True))
    return None if worst <= TOLERANCE else f"WRONG: {worst:.1e} from the table's choice"


def compile_all(jobs: list[tuple[str, Case]], dtype: torch.dtype, device: torch.device) -> None:
    """Run each variant at a short length, in as many processes as there are cores, at most 12."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=spawn) as pool:
        runs = [
            pool.submit(_compile, target, str(case.shrunk(COMPILED_AT)), dtype, variant)
            for target, case in jobs
            for variant in _variants(target, case.head_dim, _chosen(target, case.head_dim, dtype, device))
        ]
        for run in runs:
            run.exception()  # what it raises comes back in this process, where the table names it


def _compile(target: str, case: str, dtype: torch.dtype, variant) -> None:
    _runner(target, Case.parse(case), dtype, torch.device("cuda"))(variant)
