"""One rank's share of a ring, timed on one device: everything that ring_attention does except waiting for transfers.

    efficiency = (one call over the whole causal sequence, same kernel) x (pairs of the case / pairs of that) / ranks
                 ------------------------------------------------------------------------------------------------
                                                  the rank's own time

An efficiency of 1 means that the ring adds nothing to its kernels and gives every rank the same work. The rank runs the
code that training runs, on a ring object that delivers nothing. Its time includes the carry, accumulation in fp32,
zeroing, delta, the gradients' return and the conversion to the inputs' dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import checks, ring_cases, timing
from benchmarks.ring_cases import Noise, Passes, RingCase, whole_ring
from benchmarks.timing import Timing
from ringflash import AttentionPlan, Loopback, kernels
from ringflash.ring.message import Message
from ringflash.ring.ranges import Range, Ranges
from ringflash.ring.transport import Allocate
from ringflash.ring.watchdog import Label

CHECKED_LENGTH = 2048
COLUMNS = ("forward", "backward", "both")

# Efficiency forward, backward, both of others' zigzag rings under a causal mask, 32/8 heads of 128, bf16, by (tokens,
# ranks). "one rank": their code's compute for one rank, communication free, timed as here on one H100 80GB SXM, but not
# in this run. "published": by its authors on 8 H800, communication included, against flash attention / 8.
PEERS: dict[tuple[int, int, str], dict[str, tuple[float | None, ...]]] = {
    (65536, 8, "causal"): {
        "reference ring on FA4-CuTe, one rank": (0.777, 0.818, 0.807),
        "reference ring on FA2, one rank": (0.876, 0.885, 0.883),
        "reference ring on FA2, published": (0.85, None, 0.90),
    },
    (131072, 8, "causal"): {
        "reference ring on FA4-CuTe, one rank": (0.803, 0.917, 0.884),
        "reference ring on FA2, one rank": (0.945, 0.925, 0.931),
    },
    (131072, 16, "causal"): {
        "reference ring on FA4-CuTe, one rank": (0.792, 0.836, 0.824),
        "reference ring on FA2, one rank": (0.830, 0.899, 0.878),
    },
    (131072, 4, "causal"): {
        "reference ring on FA4-CuTe, one rank": (0.890, 0.959, 0.939),
        "reference ring on FA2, one rank": (0.980, 0.978, 0.979),
    },
    (131072, 8, "packed"): {"reference ring on FA2, published at 64k/8": (0.70, None, 0.76)},
}


@dataclass(frozen=True)
class Arrival:
    """A finished receive: complete once the copies before this event are done."""

    event: torch.cuda.Event | None

    def wait(self) -> None:
        """Make the current stream wait for them."""
        if self.event is not None:
            self.event.wait()


class OneRank:
    """A rank of a ring of `size` without the others: the data that it would receive is random and arrives at once.

    Zeros draw less power than random numbers, and a GPU then runs at a higher clock. So receive buffers are filled with
    random numbers once and reused from pass to pass. A pass may clear the part of a buffer that its first message
    leaves unwritten. If later messages arrive there, random numbers are copied to it.
    """

    def __init__(self, size: int, rank: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.local: tuple[int, ...] = (rank,)
        self.device = torch.device(device)
        self._noise = Noise()
        self._buffers: list[Tensor] = []  # in the order in which a pass asks for them
        self._here: dict[int, Ranges] = {}  # in this pass, elements that are not cleared, by address

    @contextmanager
    def receive_buffers(self, label: Label) -> Iterator[Allocate]:
        """The buffers of earlier passes, if they fit."""
        self._here.clear()
        count = itertools.count()

        def kept(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            n = next(count)
            if n == len(self._buffers) or (self._buffers[n].shape, self._buffers[n].dtype) != (tuple(shape), dtype):
                self._buffers[n:] = [torch.randn(*shape, dtype=dtype, device=self.device)]
            return self._buffers[n]

        yield kept

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Arrival:
        """Copy random numbers to cleared places, on the current stream."""
        copied = False
        self._here = {_address(m.tensor): _EVERYTHING for m in outgoing} | self._here
        before = dict(self._here)
        for message in incoming:
            x, address = message.tensor, _address(message.tensor)
            start = int(x.storage_offset())
            coming = Ranges([Range(start, start + x.numel())])
            for begin, end in coming.without(before.get(address, _EVERYTHING)):
                part = x.view(-1)[begin - start : end - start]
                part.copy_(self._noise.like(part))
                copied = True
            self._here[address] = self._here.get(address, Ranges()).union(coming)
        on_gpu = copied and self.device.type == "cuda"
        return Arrival(torch.cuda.current_stream(self.device).record_event() if on_gpu else None)


_EVERYTHING = Ranges([Range(0, 2**62)])  # of a buffer


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@dataclass(frozen=True)
class Share:
    """Times of some ranks of a case.

    status: "timed", "WRONG" or "failed"; reason: why it was not timed. errors: those of the small ring against float64,
    by tensor. whole, ranks: times of one call over the whole causal sequence, and of each rank, by direction. share_ms:
    the time of a rank in a perfect ring. busiest: the pairs of the rank with most, relative to the mean.
    ns_per_million_pairs: of the whole call, for one query head.
    """

    case: str
    kernel: str
    status: str
    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    busiest: float = 1.0
    share_ms: dict[str, float] = field(default_factory=dict)
    whole: dict[str, Timing] = field(default_factory=dict)
    ranks: dict[int, dict[str, Timing]] = field(default_factory=dict)
    ns_per_million_pairs: dict[str, float] = field(default_factory=dict)

    def milliseconds(self, column: str) -> list[float]:
        """Each timed rank's time: forward, backward, or both."""
        return [sum(took[d].ms for d in took if column in (d, "both")) for took in self.ranks.values()]

    def efficiency(self, column: str) -> dict[str, float]:
        """Of the slowest timed rank, and of their mean time."""
        share = sum(ms for direction, ms in self.share_ms.items() if column in (direction, "both"))
        times = self.milliseconds(column)
        return {"slowest": share / max(times), "mean": share * len(times) / sum(times)}

    def summary(self) -> dict[str, Any]:
        """Efficiencies by which rank and column, or the status."""
        if self.status != "timed":
            return {"status": self.status, "reason": self.reason}
        by_column = {column: self.efficiency(column) for column in COLUMNS}
        return {which: {c: round(by_column[c][which], 4) for c in COLUMNS} for which in ("slowest", "mean")}


def measure(case: RingCase, kernel: str, dtype: torch.dtype, device: torch.device, seconds: float) -> Share:
    """Check a small ring of the case against float64, then time its ranks and the whole call in interleaved rounds."""
    name = kernel
    try:
        name = kernels.select(*_like(case, dtype, device), None, kernel).name
        errors = check(case, kernel, dtype, device)
        if errors.wrong:
            return Share(str(case), name, "WRONG", errors.wrong, errors.found)
        return _timed(case, name, dtype, device, seconds, errors.found)
    except Exception as error:  # the table shows the error, and the other cases continue
        return Share(str(case), name, "failed", f"{type(error).__name__}: {error}".splitlines()[0][:200])


def check(case: RingCase, kernel: str, dtype: torch.dtype, device: torch.device) -> checks.Errors:
    """The errors of all ranks of a small version of the case against float64, with memory that starts as NaN."""
    small = case.shrunk(CHECKED_LENGTH)
    assert isinstance(small, RingCase)
    inputs = small.inputs(dtype, device)
    with checks.poisoned():
        results = whole_ring(inputs, small.plan(Loopback(small.ranks, device)), kernel)
    return checks.whole(small, inputs).errors(**results)


def measured_ranks(pairs: list[int]) -> list[int]:
    """The ranks that are timed: first, middle, last, and the one with most (query, key) pairs."""
    return sorted({0, len(pairs) // 2, len(pairs) - 1, max(range(len(pairs)), key=pairs.__getitem__)})


def pairs_by_rank(plan: AttentionPlan) -> list[int]:
    """(query, key) pairs of each rank's queries, of one head."""
    visible = torch.stack([(mask.hi - mask.lo).sum(0) for mask in plan.masks])
    return [int(plan.layout.shard(visible, rank).sum()) for rank in range(plan.layout.ranks)]


def _timed(
    case: RingCase, kernel: str, dtype: torch.dtype, device: torch.device, seconds: float, errors: dict[str, float]
) -> Share:
    whole = case.whole()
    inputs = case.inputs(dtype, device)
    pairs = pairs_by_rank(case.plan(Loopback(case.ranks)))
    rings = {"whole": OneRank(1, 0, device)}
    rings |= {f"rank {rank}": OneRank(case.ranks, rank, device) for rank in measured_ranks(pairs)}
    runs: dict[str, Callable[[], object]] = {}
    for name, ring in rings.items():
        plan = (whole if name == "whole" else case).plan(ring)
        forward, backward = passes(plan, inputs, kernel)
        runs |= {f"{name} forward": forward, f"{name} backward": backward}
    found = timing.interleaved(runs, device, seconds)
    times: dict[str, dict[str, Timing]] = {name: {} for name in rings}
    for run, took in found.items():
        if isinstance(took, Exception):
            raise took
        name, _, direction = run.rpartition(" ")
        times[name][direction] = took
    whole_times = times.pop("whole")
    part = case.head_pairs() / whole.head_pairs() / case.ranks
    return Share(
        str(case), kernel, "timed", errors=errors, busiest=max(pairs) * len(pairs) / sum(pairs),
        share_ms={direction: took.ms * part for direction, took in whole_times.items()}, whole=whole_times,
        ranks={int(name.removeprefix("rank ")): took for name, took in times.items()},
        ns_per_million_pairs={d: took.ms * 1e12 / whole.head_pairs() for d, took in whole_times.items()},
    )  # fmt: skip


def passes(plan: AttentionPlan, inputs: tuple[Tensor, ...], kernel: str) -> Passes:
    """A rank's forward, and its backward alone; on a GPU, as CUDA graphs, which run without the host."""
    if plan.ring.device.type == "cpu":
        return ring_cases.passes(inputs, plan, kernel)
    with timing.side_stream(plan.ring.device) as stream:
        forward, backward = ring_cases.passes(inputs, plan, kernel)
        return timing.Graph.of(forward, stream), timing.Graph.of(backward, stream)


def _like(case: RingCase, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A small q and k of the case's heads."""
    q, k, *_ = case.shrunk(1).inputs(dtype, device)
    return q, k


# -- what is printed and drawn


def peer_figures(case: RingCase) -> dict[str, tuple[float | None, ...]]:
    """Peers' figures from other runs for a case's length, ranks, heads and mask, all with zigzag."""
    if (case.heads, case.kv_heads, case.head_dim, case.layout) != (32, 8, 128, "zigzag"):
        return {}
    return PEERS.get((case.length, case.ranks, case.kind), {})


def table(case: RingCase, share: Share, header: bool) -> str:
    """A line for the slowest rank, one for the mean, and one per peer."""
    lines = []
    if header:
        lines.append(_line("case", "ring", "rank", ["forward", "backward", "both", "busiest", "ms fwd + bwd"]))
        lines.append("-" * len(lines[0]))
    ours = f"ringflash {share.kernel}"
    if share.status != "timed":
        lines.append(f"{share.case:<26} {ours:<42} {share.status}: {share.reason}")
    else:
        for which, of_all in (("slowest", max), ("mean", lambda times: sum(times) / len(times))):
            ms = " + ".join(f"{of_all(share.milliseconds(direction)):.2f}" for direction in COLUMNS[:2])
            cells = [f"{share.efficiency(column)[which]:.3f}" for column in COLUMNS]
            rank = f"{which} of {','.join(map(str, share.ranks))}"
            lines.append(_line(share.case, ours, rank, [*cells, f"{share.busiest:.3f}", ms]))
    for name, figures in peer_figures(case).items():
        lines.append(
            _line(share.case, name, "not of this run", [*("-" if x is None else f"{x:.3f}" for x in figures), "", ""])
        )
    return "\n".join(line.rstrip() for line in lines)


def _line(case: str, ring: str, rank: str, cells: list[str]) -> str:
    numbers = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, (8, 8, 8, 8, 16), strict=True))
    return f"{case:<26} {ring:<42} {rank:<20} {numbers}"


def draw(path: Path, cases: list[RingCase], shares: list[Share], title: str) -> None:
    """Bars of efficiency by case: our slowest rank and mean, and the peers."""
    from matplotlib.figure import Figure

    timed = [(case, share) for case, share in zip(cases, shares, strict=True) if share.status == "timed"]
    figure = Figure(figsize=(max(7.0, 1.6 * len(timed) + 2), 8), layout="constrained")
    for i, (axes, column) in enumerate(zip(figure.subplots(3, 1, sharex=True), COLUMNS, strict=True)):
        bars: dict[str, dict[int, float]] = {}
        for x, (case, share) in enumerate(timed):
            for which, value in share.efficiency(column).items():
                bars.setdefault(f"ringflash, {which} rank", {})[x] = value
            for name, figures in peer_figures(case).items():
                if (figure_ := figures[i]) is not None:
                    bars.setdefault(name, {})[x] = figure_
        width = 0.85 / max(1, len(bars))
        for j, (name, heights) in enumerate(bars.items()):
            places = [x + (j - (len(bars) - 1) / 2) * width for x in heights]
            drawn = axes.bar(places, list(heights.values()), width, label=name)
            axes.bar_label(drawn, fmt="%.3f", fontsize=6, rotation=90, padding=2)
        axes.axhline(1.0, color="black", linewidth=0.6)
        axes.set(ylabel=column, ylim=(0, 1.3), xticks=range(len(timed)))
        axes.set_xticklabels([str(case).replace(" ", "\n", 1) for case, _ in timed], fontsize=8)
    if timed:
        figure.axes[-1].legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    figure.suptitle(f"one rank's efficiency against (whole call / ranks)\n{title}", fontsize=9)
    figure.savefig(path, dpi=110)
