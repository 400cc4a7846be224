"""One rank's share of a ring, timed on one device: everything that ring_attention does except waiting for transfers.

    efficiency = (one call over the whole causal sequence, same kernel) x (pairs of the case / pairs of that) / ranks
                 ------------------------------------------------------------------------------------------------
                                                  the rank's own time

An efficiency of 1 means that the ring adds nothing to its kernels and gives every rank the same work. The rank runs the
code that training runs, on a ring object without neighbours. Its time includes the carry, accumulation in fp32,
zeroing, delta, the gradients' return and the conversion to the inputs' dtype.

Each rank is timed twice: with messages that are already there (`OneRank`), and with messages that are copied to their
places (`CopiedRank`). Copy engines write messages without multiprocessors, but these copies run on them. The second
figure is therefore an upper bound on what arrivals cost the GPU. Neither includes waiting for a slow link.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import checks, ring_cases, timing
from benchmarks.report import bars
from benchmarks.ring_cases import Noise, Passes, RingCase, whole_ring
from benchmarks.timing import Timing
from ringflash import AttentionPlan, Loopback, kernels
from ringflash.ring.execution import Memory
from ringflash.ring.message import Message
from ringflash.ring.schedule import Rows
from ringflash.ring.transport import Allocate
from ringflash.ring.watchdog import Label

CHECKED_LENGTH = 2048
TIMED_RANKS = 8  # at most
COLUMNS = ("forward", "backward", "both")
COPIED = "slowest with copies"


@dataclass(frozen=True)
class Arrival:
    """A finished receive: complete once the copies before this event are done."""

    event: torch.cuda.Event | None

    def wait(self) -> None:
        """Make the current stream wait for them."""
        if self.event is not None:
            self.event.wait()


_zero_in_place = Memory.zero


def _zero_elsewhere(memory: Memory, several: Sequence[Rows]) -> None:
    """Zero gradients in place, but rows of keys in other memory of the same size."""
    of_keys = [rows for rows in several if rows.buffer.startswith("keys")]
    if views := [x for rows in of_keys for x in memory.rows(rows)]:
        torch._foreach_zero_([torch.empty_like(x) for x in views])
    _zero_in_place(memory, [rows for rows in several if rows not in of_keys])


class OneRank:
    """A rank of a ring of `size` without the others: what it would receive is already there, and nothing is copied.

    Receive buffers are filled with random numbers once and reused from pass to pass. Zeros would draw less power, and
    the GPU would then run at a higher clock. A pass zeroes the rows of keys that its first message leaves unwritten,
    and later messages may fill them. These zeros are written to other memory, so that kernels read random numbers.

    A pass adds to the gradients that it would receive, so these grow by the same amount in every pass. `check_finite`
    raises an error if they overflow.
    """

    def __init__(self, size: int, rank: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.local: tuple[int, ...] = (rank,)
        self.device = torch.device(device)
        self._buffers: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}

    @contextmanager
    def receive_buffers(self, label: Label) -> Iterator[Allocate]:
        """The buffers of earlier passes that asked for the same. None is freed: a graph may have its address."""
        count = itertools.count()

        def kept(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            which = next(count), tuple(shape), dtype
            if which not in self._buffers:
                self._buffers[which] = torch.randn(*shape, dtype=dtype, device=self.device)
            return self._buffers[which]

        with self._zeroing():
            yield kept

    @property
    def buffers(self) -> list[Tensor]:
        """All buffers, in the order in which passes first asked for them."""
        return [*self._buffers.values()]

    def _zeroing(self) -> AbstractContextManager[object]:
        """A context in which a pass zeroes rows of keys in other memory."""
        return mock.patch.object(Memory, "zero", _zero_elsewhere)

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Arrival:
        """Leave the messages' places as they are."""
        return Arrival(None)

    def check_finite(self) -> None:
        """Raise ArithmeticError if a receive buffer holds inf or NaN."""
        if not all(bool(x.isfinite().all()) for x in self.buffers):
            raise ArithmeticError(f"rank {self.local[0]} of {self.size}: a receive buffer holds inf or NaN")


class CopiedRank(OneRank):
    """A rank whose messages are copies of random numbers, on their own stream.

    The copies start after what was queued before the exchange, and the wait ends after them, as with copy engines. A
    copy reads as much memory as it writes, as a rank does that sends as much as it receives.
    """

    def __init__(self, size: int, rank: int, device: torch.device | str = "cpu") -> None:
        super().__init__(size, rank, device)
        self._noise = Noise()
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _zeroing(self) -> AbstractContextManager[object]:
        """A context in which a pass zeroes in place: messages arrive later."""
        return nullcontext()

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Arrival:
        """Copy random numbers to the places of all incoming messages."""
        if self._copying is not None and incoming:
            self._copying.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copying):  # of None, as on the CPU, this does nothing
            for message in incoming:
                message.tensor.copy_(self._noise.like(message.tensor))
        return Arrival(self._copying.record_event() if self._copying is not None and incoming else None)


@dataclass(frozen=True)
class Share:
    """Times of the ranks of a case that are timed.

    status: "timed", "WRONG" or "failed"; reason: why it was not timed. errors: those of the small ring against float64,
    by tensor. busiest: the pairs of the rank with most, relative to the mean. share_ms: the time of a rank in a perfect
    ring. whole, ranks, copied: times of one call over the whole causal sequence, of each rank, and of each rank whose
    messages are copied, by direction.
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
    copied: dict[int, dict[str, Timing]] = field(default_factory=dict)
    ns_per_million_pairs: dict[str, float] = field(default_factory=dict)

    def milliseconds(self, column: str) -> dict[str, float]:
        """Forward, backward, or both: of the slowest timed rank, of their mean, and of the slowest with copies."""
        alone, copied = self._by_rank(column)
        return {"slowest": max(alone.values()), "mean": sum(alone.values()) / len(alone), COPIED: max(copied.values())}

    def which_ranks(self) -> dict[str, str]:
        """Which ranks these are, by the time of both passes: "slowest, 6 of 0-7"."""
        alone, copied = self._by_rank("both")
        of = f"of {_listed([*alone])}"
        return {
            "slowest": f"slowest, {max(alone, key=alone.__getitem__)} {of}",
            "mean": f"mean {of}",
            COPIED: f"{COPIED}, {max(copied, key=copied.__getitem__)} {of}",
        }

    def _by_rank(self, column: str) -> tuple[dict[int, float], dict[int, float]]:
        """Milliseconds of each timed rank, and of each with copies."""
        alone, copied = (
            {rank: sum(took[d].ms for d in took if column in (d, "both")) for rank, took in ranks.items()}
            for ranks in (self.ranks, self.copied)
        )
        return alone, copied

    def efficiency(self, column: str) -> dict[str, float]:
        """The same as efficiencies."""
        share = sum(ms for direction, ms in self.share_ms.items() if column in (direction, "both"))
        return {which: share / ms for which, ms in self.milliseconds(column).items()}

    def summary(self) -> dict[str, Any]:
        """Efficiencies by which rank and column, or the status."""
        if self.status != "timed":
            return {"status": self.status, "reason": self.reason}
        by_column = {column: self.efficiency(column) for column in COLUMNS}
        return {which: {c: round(by_column[c][which], 4) for c in COLUMNS} for which in by_column["both"]}


def measure(case: RingCase, kernel: str, dtype: torch.dtype, device: torch.device, seconds: float) -> Share:
    """Check a small ring of the case against float64, then time its ranks and the whole call in interleaved rounds."""
    name = kernel
    try:
        name = kernels.select(*case.shrunk(1).inputs(dtype, device)[:2], None, kernel).name
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
    return checks.Reference(small, inputs).errors(**results)


def measured_ranks(plan: AttentionPlan) -> list[int]:
    """The ranks that are timed: all, or of a larger ring those with the most work (`Layout.work`)."""
    work = sum(plan.layout.work(mask).sum(1) for mask in plan.masks)
    return sorted(sorted(range(plan.layout.ranks), key=lambda rank: -work[rank])[:TIMED_RANKS])


def pairs_by_rank(plan: AttentionPlan) -> list[int]:
    """(query, key) pairs of each rank's queries, of one head."""
    visible = torch.stack([(mask.hi - mask.lo).sum(0) for mask in plan.masks])
    return [int(plan.layout.shard(visible, rank).sum()) for rank in range(plan.layout.ranks)]


def _timed(
    case: RingCase, kernel: str, dtype: torch.dtype, device: torch.device, seconds: float, errors: dict[str, float]
) -> Share:
    whole = case.whole()
    inputs = case.inputs(dtype, device)
    plan = case.plan(Loopback(case.ranks))
    pairs, ranks = pairs_by_rank(plan), measured_ranks(plan)
    rings = {"whole": OneRank(1, 0, device)}
    rings |= {f"rank {rank}": OneRank(case.ranks, rank, device) for rank in ranks}
    rings |= {f"copied {rank}": CopiedRank(case.ranks, rank, device) for rank in ranks}
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
    for ring in rings.values():
        ring.check_finite()
    whole_times = times["whole"]
    part = case.head_pairs() / whole.head_pairs() / case.ranks
    return Share(
        str(case), kernel, "timed", errors=errors, busiest=max(pairs) * len(pairs) / sum(pairs),
        share_ms={direction: took.ms * part for direction, took in whole_times.items()}, whole=whole_times,
        ranks={rank: times[f"rank {rank}"] for rank in ranks},
        copied={rank: times[f"copied {rank}"] for rank in ranks},
        ns_per_million_pairs={d: took.ms * 1e12 / whole.head_pairs() for d, took in whole_times.items()},
    )  # fmt: skip


def passes(plan: AttentionPlan, inputs: tuple[Tensor, ...], kernel: str) -> Passes:
    """A rank's forward, and its backward alone; on a GPU, as CUDA graphs, which run without the host."""
    if plan.ring.device.type == "cpu":
        return ring_cases.passes(inputs, plan, kernel)
    with timing.side_stream(plan.ring.device) as stream:
        forward, backward = ring_cases.passes(inputs, plan, kernel)
        backward()  # all receive buffers are allocated and filled before a graph is captured
        return timing.Graph.of(forward, stream), timing.Graph.of(backward, stream)


def _listed(ranks: list[int]) -> str:
    """The ranks, ascending, where three or more in a row are one range.

    >>> _listed([0, 1, 2, 3, 8, 9])
    '0-3,8,9'
    """
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


# -- what is printed and drawn


def table(share: Share, header: bool) -> str:
    """A line for the slowest rank, one for the mean, and one for the slowest with copies."""
    lines = []
    if header:
        lines.append(_line("case", "ring", "rank", ["forward", "backward", "both", "busiest", "ms fwd + bwd"]))
        lines.append("-" * len(lines[0]))
    ours = f"ringflash {share.kernel}"
    if share.status != "timed":
        lines.append(f"{share.case:<26} {ours:<20} {share.status}: {share.reason}")
    else:
        ms = {direction: share.milliseconds(direction) for direction in COLUMNS[:2]}
        for which, rank in share.which_ranks().items():
            cells = [f"{share.efficiency(column)[which]:.3f}" for column in COLUMNS]
            took = " + ".join(f"{of[which]:.2f}" for of in ms.values())
            lines.append(_line(share.case, ours, rank, [*cells, f"{share.busiest:.3f}", took]))
    return "\n".join(line.rstrip() for line in lines)


def _line(case: str, ring: str, rank: str, cells: list[str]) -> str:
    numbers = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, (8, 8, 8, 8, 16), strict=True))
    return f"{case:<26} {ring:<20} {rank:<30} {numbers}"


def draw(path: Path, shares: list[Share], title: str) -> None:
    """Bars of efficiency by case: the slowest rank, the mean, and the slowest rank with copies."""
    from matplotlib.figure import Figure

    timed = [share for share in shares if share.status == "timed"]
    figure = Figure(figsize=(max(7.0, 1.6 * len(timed) + 2), 8), layout="constrained")
    for axes, column in zip(figure.subplots(3, 1, sharex=True), COLUMNS, strict=True):
        found: dict[str, dict[str, float]] = {}
        for share in timed:
            for which, value in share.efficiency(column).items():
                found.setdefault(which, {})[share.case] = value
        bars(axes, [share.case for share in timed], found, "%.3f")
        axes.axhline(1.0, color="black", linewidth=0.6)
        axes.set(ylabel=column, ylim=(0, 1.3))
    if timed:
        figure.axes[-1].legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    figure.suptitle(f"one rank's efficiency against (whole call / ranks)\n{title}", fontsize=9)
    figure.savefig(path, dpi=110)
