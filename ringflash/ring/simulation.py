"""Simulation: when each rank of a ring computes, sends and waits, predicted from the ranks' schedules.

- A rank's GPU runs one `Attend` at a time, whatever its stream, in the order of the schedule. Nothing else takes time.
  Packed documents take about 30 percent longer than predicted, because tiles are short or partly masked.
- A rank's exchanges run one after another. A message starts once both of its ranks have reached its `Post` and both
  links are free.
- A rank's link carries its outgoing and incoming bytes at the same time, each at the given speed.

A rank that waits while its own link is busy waits for the link, and a faster link would help. Otherwise it waits for a
rank that is behind, and a better layout would help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ringflash.ring.schedule import Attend, Fork, Join, Post, Rows, Step, Wait

COMPUTE, KEYS, GRADIENTS = "compute", "keys", "gradients"
WAITS = ("wait for the link", "wait for a rank")


class Span(NamedTuple):
    """A span of time in seconds, in which a rank computes, waits or receives. hop: that of a compute span, or -1."""

    rank: int
    kind: str
    begin: float
    end: float
    hop: int = -1


@dataclass(frozen=True)
class Rates:
    """Seconds of a step's kernel, bytes per row of a buffer, and bytes per second of a link in each direction."""

    kernel: Callable[[Attend], float]
    row: Callable[[str], float]
    link: float


@dataclass
class Simulated:
    """A simulated pass: the spans of all ranks, when each rank finished, and the bytes that each sent."""

    spans: list[Span] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The time until the last rank finishes."""
        return max(self.finished)

    def total(self, kind: str, rank: int | None = None) -> float:
        """Seconds of all spans of a kind, of one rank or of all ranks."""
        return sum(span.end - span.begin for span in self.spans if span.kind == kind and rank in (None, span.rank))


def simulate(schedules: Iterable[Iterable[Step]], rates: Rates) -> Simulated:
    """Simulate a pass from the steps of all ranks. Raises ValueError if ranks have different numbers of steps."""
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
    """A rank's clocks: of each stream and the GPU, when its link is free and was busy, when its exchanges end."""

    def __init__(self, rank: int, rates: Rates, spans: list[Span]) -> None:
        self.rank, self.rates, self.spans = rank, rates, spans
        self.streams = [0.0, 0.0]
        self.gpu = self.link = 0.0
        self.busy: list[tuple[float, float]] = []
        self.over: dict[str, float] = {}

    def do(self, step: Step) -> None:
        """Run a step that is not an exchange, since an exchange involves several ranks."""
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
        """Wait until `end`, in spans in which the rank's link is busy or free."""
        while self.gpu < end:
            covering = [until for begin, until in self.busy if begin <= self.gpu < until]
            later = [begin for begin, _ in self.busy if begin > self.gpu]
            kind, until = (WAITS[0], max(covering)) if covering else (WAITS[1], min([*later, end]))
            self.spans.append(Span(self.rank, kind, self.gpu, min(until, end)))
            self.gpu = min(until, end)


def _exchange(ranks: list[_Rank], posts: tuple[Post, ...], rates: Rates, pass_: Simulated) -> None:
    """Simulate an exchange: a message starts when both ranks are ready, and takes as long as the busier link."""
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
