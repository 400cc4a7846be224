"""Attention on one device: ringflash's kernels and those of other libraries, in one run.

    python benchmarks/attention.py --device cpu --quick              # any machine, seconds: does it work here
    python benchmarks/attention.py --quick                           # a GPU, two cases, under 2 minutes
    python benchmarks/attention.py                                   # a GPU, all cases, under 8 minutes
    python benchmarks/attention.py --cases packed '1,8,8,64k,128 causal' --only ringflash cuDNN
    python benchmarks/attention.py --against ../other --only hopper  # this version and another, interleaved
    python benchmarks/attention.py --sweep                           # tile sizes of the portable kernels, best first

A case is `B,Hq,Hkv,S,D mask` (benchmarks/cases.py). --cases takes parts of the listed names, or a new case.
benchmarks/contenders.py lists the contenders. The table gives the reason for each one that is not timed.

Results are checked before they are timed. Each kernel's out, dq, dk and dv are compared with float64 at up to 2048
tokens, then some rows of out and dq at full size (benchmarks/checks.py). A kernel with wrong results is marked WRONG
and not timed. The exit code is then 1, as it is if one of ringflash's kernels raises.

Inputs are standard normal. A forward keeps what a backward needs. A backward is `torch.autograd.grad` alone. It
includes all that a user pays for: for ringflash also delta = rowsum(dout * out), zeroing fp32 buffers, and converting
them to the inputs' dtype. Kernels take turns in an order that is shuffled each round, so that power capping
affects all alike. A figure is the median of its rounds (benchmarks/timing.py).

FLOPs are counted from the mask: 4 D per visible pair and query head in the forward, and 2.5 times that in the backward.
% peak is relative to the dense bf16 peak of the datasheet. ns/Mpair is the time per million (query, key) pairs of one
head, which makes masks of any shape comparable.

After every case, attention-DEVICE.json is written to the folder --out (benchmarks/results), and its picture at the end.
The last line printed is the summary in JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cases, checks, contenders, report, sweep, timing
from benchmarks.cases import Case
from benchmarks.checks import Reference
from benchmarks.contenders import Contender
from benchmarks.options import DTYPES, parse, shared_parser
from benchmarks.report import Row
from benchmarks.timing import Timing
from ringflash.ring.cost import peak_flops

DIRECTIONS = ("forward", "backward")
CHECKED_LENGTH = 2048


@dataclass
class Entry:
    """One contender on one case.

    refusals: (status, reason) by direction that is not timed, "both" or "backward". errors: the largest error so far,
    by direction. runs: the timed functions, by direction.
    """

    contender: Contender
    refusals: dict[str, tuple[str, str]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    runs: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def refused(self, direction: str) -> bool:
        """Whether this direction will not be timed; a backward needs its forward."""
        return "both" in self.refusals or direction in self.refusals

    def check(self, case: Case, inputs: tuple[Tensor, ...], reference: Reference) -> None:
        """Run both directions once on these inputs, compare the results, and keep the functions for timing."""
        if self.refused("forward"):
            return
        q, k, v, dout = inputs
        poison = checks.poisoned if self.contender.ours else contextlib.nullcontext
        try:
            attention = self.contender.build(case, q, k)
            with poison():
                out = attention(q, k, v)
            self.runs["forward"] = functools.partial(attention, q, k, v)
            self.runs["backward"] = functools.partial(torch.autograd.grad, out, (q, k, v), dout, retain_graph=True)
            self._judge("forward", reference.errors(out=out.detach()), case)
        except contenders.Absent as reason:
            self.refusals["both"] = ("absent", str(reason))
        except Exception as error:  # a peer may raise anything; the table shows the error
            self.refusals["both"] = ("failed", report.error_line(error))
        if self.refused("backward"):
            return
        try:
            with poison():
                gradients = self.runs["backward"]()
            found = dict(zip(checks.NAMES[1:], gradients, strict=True))
            self._judge("backward", reference.errors(**found), case)
        except Exception as error:
            self.refusals["backward"] = ("failed", report.error_line(error))

    def _judge(self, direction: str, errors: checks.Errors, case: Case) -> None:
        self.errors[direction] = max(self.errors.get(direction, 0.0), errors.worst)
        if errors.wrong:
            self.refusals["both" if direction == "forward" else direction] = ("WRONG", f"{errors.wrong} at {case}")


def measure(
    case: Case,
    entrants: list[Contender],
    absent: dict[str, str],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> list[Row]:
    """Check, then time, all entrants on a case. absent: names that do not take part, and why."""
    entries = [Entry(c, {"both": ("absent", absent[c.name])} if c.name in absent else {}) for c in entrants]
    for version, reference_of in ((case.shrunk(CHECKED_LENGTH), Reference), (case, checks.some_rows)):
        inputs = version.inputs(dtype, device)
        reference = reference_of(version, inputs)
        for entry in entries:
            entry.check(version, inputs, reference)
        del reference
    rows: list[Row] = []
    for direction in DIRECTIONS:
        shown = [e for e in entries if direction == "forward" or "both" not in e.refusals]
        variants = {e.contender.name: e.runs[direction] for e in shown if not e.refused(direction)}
        found = timing.interleaved(variants, device, seconds)
        rows += _rows(case, direction, shown, found, contenders.BASELINE[device.type], peak_flops(device))
    return rows


def _rows(
    case: Case,
    direction: str,
    entries: list[Entry],
    found: dict[str, Timing | Exception],
    baseline: str,
    peak: float | None,
) -> list[Row]:
    """One row per entry: its time, or the reason why there is none."""
    rows = []
    reference = found.get(baseline)
    for entry in entries:
        name, took = entry.contender.name, found.get(entry.contender.name)
        if isinstance(took, Timing):
            tflops = case.flops(direction) / took.ms / 1e9
            row = Row(
                str(case), direction, name, "timed", timing=took, tflops=tflops,
                percent_of_peak=100e12 * tflops / peak if peak else None,
                ratio=reference.ms / took.ms if isinstance(reference, Timing) else None,
                ns_per_million_pairs=took.ms * 1e12 / case.head_pairs(), error=entry.errors[direction],
            )  # fmt: skip
        elif took is not None:  # correct when it was checked, but it raised while it was timed
            row = Row(str(case), direction, name, "failed", report.error_line(took), error=entry.errors[direction])
        else:
            extent = "both" if "both" in entry.refusals else direction
            row = Row(str(case), extent, name, *entry.refusals[extent], error=entry.errors.get(direction))
        rows.append(row)
    return rows


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = shared_parser(__doc__, seconds=0.4)
    parser.add_argument("--quick", action="store_true", help="two cases; on the CPU, tiny ones")
    parser.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="parts of names, or whole cases")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts of kernels' names")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="another version of ringflash to time in the same turns"
    )
    parser.add_argument(
        "--sweep", nargs="*", choices=sweep.TARGETS, metavar="KERNEL",
        help=f"tile sizes instead of cases: all, or some of {', '.join(sweep.TARGETS)}",
    )  # fmt: skip
    options = parse(parser, arguments)
    if options.sweep is not None and options.device == "cpu":
        parser.error("--sweep times Triton kernels and needs --device cuda")
    full, quick = (cases.GPU_CASES, cases.GPU_QUICK) if options.device == "cuda" else (cases.CPU_CASES, cases.CPU_QUICK)
    try:
        options.cases = cases.selected(options.cases, quick if options.quick else full)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code: 1 if a kernel is wrong, or one of ours raises."""
    options = _options(arguments)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    peak = peak_flops(device)
    known = f"{peak / 1e12:.0f} TFLOP/s dense bf16" if peak else "unknown (not in ringflash.ring.cost.PEAKS)"
    facts = report.card(device, {"peak": known, **report.versions(contenders.PACKAGES)}, options.commit)
    print(report.card_line(facts), f"inputs {options.dtype}", "", sep="\n")
    if options.sweep is not None:
        return sweep.main(options.sweep or list(sweep.TARGETS), dtype, device, options.out, facts)
    entrants = contenders.contenders(device, options.against and contenders.imported(options.against))
    asked = contenders.asked(entrants, options.only)
    absent = {entrant.name: "not asked for (--only)" for entrant in entrants if entrant not in asked}
    file = options.out / f"attention-{report.slug(device)}.json"
    rows: list[Row] = []
    for case in options.cases:
        measured = measure(case, entrants, absent, dtype, device, options.seconds)
        print(report.table(measured, contenders.BASELINE[device.type], header=not rows) + "\n", flush=True)
        rows += measured
        contents = {"benchmark": "attention", "card": facts, "dtype": options.dtype, "rows": report.as_json(rows)}
        report.write_json(file, contents | {"summary": report.summary(rows)})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    title = f"attention, {options.dtype}, {report.signature(facts)}"
    report.print_written(file, report.drawn(report.plot, file, rows, title))
    ours = [entrant.name for entrant in entrants if entrant.ours]
    wrong = [
        f"{row.status}: {row.kernel}, {row.case}, {row.direction}: {row.reason}"
        for row in rows
        if row.status == "WRONG" or (row.status == "failed" and row.kernel in ours)
    ]
    print("\n".join(wrong), end="\n" if wrong else "")
    tflops = report.summary(rows)
    print(json.dumps({"benchmark": "attention", "device": facts["device"], "wrong": wrong, "tflops": tflops}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
