"""Simulation: when each rank of a ring would compute, send and wait, from the schedules that they run.

- A rank's GPU runs one `Attend` at a time, whatever its stream, in the order of the schedule. Nothing else takes time.
  Packed documents take some 30 percent more than predicted, for tiles that are short or partly masked.
- Its exchanges run one after another. A message starts when both of its ranks have posted it, after what their streams
  had queued before, and when both links are free.
- A rank's link carries its outgoing and its incoming bytes at the same time, each at the given speed.

A rank that waits while its own link is busy waits for the link, which a faster link would mend. Otherwise it waits for
a rank that is behind, which a better layout would mend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ringflash.ring.schedule import Attend, Fork, Join, Post, Rows, Step, Wait

COMPUTE, KEYS, GRADIENTS = "compute", "keys", "gradients"
WAITS = ("wait for the link", "wait for a rank")


class Span(NamedTuple):
    """Something that a rank's GPU or link does, in seconds. hop: of a compute span, otherwise -1."""

    rank: int
    kind: str
    begin: float
    end: float
    hop: int = -1


@dataclass(frozen=True)
class Rates:
    """Seconds of a step's kernel, bytes of a row of a buffer, and bytes per second of a link, each way."""

    kernel: Callable[[Attend], float]
    row: Callable[[str], float]
    link: float


@dataclass
class Simulated:
    """A simulated pass: spans of all ranks, when each rank is done, bytes that each has sent."""

    spans: list[Span] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Until the last rank is done."""
        return max(self.finished)

    def total(self, kind: str, rank: int | None = None) -> float:
        """Seconds of all spans of a kind, of one rank or all."""
        return sum(span.end - span.begin for span in self.spans if span.kind == kind and rank in (None, span.rank))


def simulate(schedules: Iterable[Iterable[Step]], rates: Rates) -> Simulated:
    """A pass of all ranks, from the steps of each. Raises ValueError where ranks have different numbers of steps."""
    steps = [iter(schedule) for schedule in schedules]
    pass_ = Simulated(sent=[0.0] * len(steps))
    ranks = [_Rank(rank, rates, pass_.spans) for rank in range(len(steps))]
    for at_once in zip(*steps, strict=True):
        if isinstance(at_once[0], Post):
            _exchange(ranks, at_once, rates, pass_)
            continue
        for rank, step in zip(ranks, at_once, strict=True):
            rank.do(step)
    for rank in ranks:
        rank.idle_until(max(rank.streams))
    pass_.finished = [rank.gpu for rank in ranks]
    return pass_


class _Rank:
    """A rank's clocks: of each stream, of the GPU, when its link is free and was busy, when its exchanges are over."""

    def __init__(self, rank: int, rates: Rates, spans: list[Span]) -> None:
        self.rank, self.rates, self.spans = rank, rates, spans
        self.streams = [0.0, 0.0]
        self.gpu = self.link = 0.0
        self.busy: list[tuple[float, float]] = []
        self.over: dict[str, float] = {}

    def do(self, step: Step) -> None:
        """Anything but an exchange, which concerns several ranks."""
        match step:
            case Attend():
                if step.pairs:
                    self.idle_until(self.streams[step.stream])
                    begun, self.gpu = self.gpu, self.gpu + self.rates.kernel(step)
                    self.streams[step.stream] = self.gpu
                    self.spans.append(Span(self.rank, COMPUTE, begun, self.gpu, step.hop))
            case Wait():
                self.streams[step.stream] = max(self.streams[step.stream], self.over.pop(step.label))
            case Fork():
                self.streams[1] = max(self.streams)
            case Join():
                self.streams[0] = max(self.streams)

    def idle_until(self, end: float) -> None:
        """Wait, in stretches in which the rank's link is busy or is not."""
        while self.gpu < end:
            covering = [until for begin, until in self.busy if begin <= self.gpu < until]
            later = [begin for begin, _ in self.busy if begin > self.gpu]
            kind, until = (WAITS[0], max(covering)) if covering else (WAITS[1], min([*later, end]))
            self.spans.append(Span(self.rank, kind, self.gpu, min(until, end)))
            self.gpu = min(until, end)


def _exchange(ranks: list[_Rank], posts: tuple[Post, ...], rates: Rates, pass_: Simulated) -> None:
    """A message starts when neither of its ranks is behind, and takes its share of the busier of two links."""
    leaving = [sum(_bytes(send.source, rates) for send in post.sends) for post in posts]
    coming = [sum(_bytes(receive.target, rates) for receive in post.receives) for post in posts]
    ready = [max(rank.streams[post.stream], rank.link) for rank, post in zip(ranks, posts, strict=True)]
    over = list(ready)
    for source, post in enumerate(posts):
        pass_.sent[source] += leaving[source]
        for peer in dict.fromkeys(send.peer for send in post.sends):
            begin = max(ready[source], ready[peer])
            end = begin + max(leaving[source], coming[peer]) / rates.link
            ranks[source].busy.append((begin, end))
            ranks[peer].busy.append((begin, end))
            pass_.spans.append(Span(peer, GRADIENTS if "gradients" in post.label else KEYS, begin, end))
            over[source], over[peer] = max(over[source], end), max(over[peer], end)
    for rank, post, end in zip(ranks, posts, over, strict=True):
        rank.over[post.label] = end if post.sends or post.receives else rank.streams[post.stream]
        if post.sends or post.receives:
            rank.link = end


def _bytes(rows: Rows, rates: Rates) -> float:
    return (rows.end - rows.begin) * rates.row(rows.buffer)
