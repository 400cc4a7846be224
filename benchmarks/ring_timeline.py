"""Where a ring of N GPUs would wait: one layer's attention, predicted hop by hop on every rank.

What every rank computes, sends and waits for, in which order, is recorded from ring_attention itself
(benchmarks/ring_record.py). `simulate` plays the records of all ranks:

- A rank's kernels run one after another, at a given time per pair. Nothing else it does takes time. Packed documents
  take some 30 percent more than predicted, for tiles that are short or partly masked.
- Its exchanges run one after another on a stream of their own, as on GPUs. A message starts when both of its ranks have
  reached it, after all kernels that they launched before it.
- A rank's link carries its outgoing and its incoming bytes at the same time, each at the given speed.
- A kernel starts when the transfers that its rank waited for are complete.

A rank that waits while its own link is busy waits for the link, which a faster link would mend. Otherwise it waits for
a rank that is behind, which a better layout would mend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.ring_cases import RingCase
from benchmarks.ring_record import Event, Exchange, Records, Wait, record

# Kinds of spans, in the order of the legend.
COLOURS = {
    "compute": "#4477aa",
    "keys": "#66aa77",
    "gradients": "#aa88bb",
    "wait for the link": "#dd2222",
    "wait for a rank": "#ffb000",
}
WAITS = ("wait for the link", "wait for a rank")


@dataclass(frozen=True)
class Speed:
    """Seconds per (query, key) pair of one query head, forward and backward; bytes per second of a link, each way."""

    forward: float
    backward: float
    link: float

    @classmethod
    def of(cls, forward_tflops: float, backward_tflops: float, head_dim: int, gbps: float) -> Speed:
        """From kernel speed in TFLOP/s, at 4 D operations per pair forward and 10 D backward, and GB/s."""
        return cls(4 * head_dim / forward_tflops / 1e12, 10 * head_dim / backward_tflops / 1e12, gbps * 1e9)


@dataclass(frozen=True)
class Span:
    """Something that a rank's GPU or link does, in seconds. hop: of a compute span, otherwise -1."""

    rank: int
    kind: str
    begin: float
    end: float
    hop: int = -1


@dataclass
class Pass:
    """A played pass: spans of all ranks, when each rank is done, bytes each has sent."""

    spans: list[Span] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Until the last rank is done."""
        return max(self.finished)

    def total(self, kind: str, rank: int | None = None) -> float:
        """Seconds of all spans of a kind, of one rank or all."""
        return sum(span.end - span.begin for span in self.spans if span.kind == kind and rank in (None, span.rank))


def simulate(records: Records, seconds_a_pair: float, bytes_a_second: float) -> Pass:
    """Play a pass of all ranks together. Raises ValueError where ranks differ on who sends what when."""
    played = Pass(sent=[0] * len(records))
    ranks = [_Rank(rank, events, seconds_a_pair, played.spans) for rank, events in enumerate(records)]
    while True:
        exchanges = [rank.advance() for rank in ranks]
        if not any(exchanges):
            played.finished = [rank.clock for rank in ranks]
            return played
        _check_ends_agree(exchanges)
        # A message sets off when neither rank's stream is behind, and takes its share of the busier of two links.
        ready = [max(rank.clock, rank.link_free) for rank in ranks]
        done = list(ready)
        for source, exchange in enumerate(exchanges):
            assert exchange is not None
            leaving = sum(exchange.outgoing.values())
            played.sent[source] += leaving
            for destination in exchange.outgoing:
                coming = sum(exchanges[destination].incoming.values())  # type: ignore[union-attr]
                begin = max(ready[source], ready[destination])
                end = begin + max(leaving, coming) / bytes_a_second
                ranks[source].busy.append((begin, end))
                ranks[destination].busy.append((begin, end))
                played.spans.append(Span(destination, exchange.kind, begin, end))
                done[source], done[destination] = max(done[source], end), max(done[destination], end)
        for rank, exchange, end in zip(ranks, exchanges, done, strict=True):
            rank.over(end, bool(exchange and (exchange.outgoing or exchange.incoming)))


class _Rank:
    """A rank that is being played: its clock, and when its link is free and was busy."""

    def __init__(self, rank: int, events: list[Event], seconds_a_pair: float, spans: list[Span]) -> None:
        self.rank, self.seconds_a_pair, self.spans = rank, seconds_a_pair, spans
        self.events = iter(events)
        self.clock = self.link_free = 0.0
        self.busy: list[tuple[float, float]] = []
        self.done: list[float] = []

    def advance(self) -> Exchange | None:
        """Compute and wait up to the next exchange, which is returned; None at the end."""
        for event in self.events:
            if isinstance(event, Exchange):
                return event
            if isinstance(event, Wait):
                self._wait_until(self.done[event.exchange])
            else:
                self._span("compute", self.clock + event.pairs * self.seconds_a_pair, event.hop)
        return None

    def over(self, end: float, had_messages: bool) -> None:
        """The exchange that advance returned is over at `end`; one without messages touches no link."""
        self.done.append(end if had_messages else self.clock)
        self.link_free = end if had_messages else self.link_free

    def _wait_until(self, end: float) -> None:
        """Wait, in stretches in which the rank's link is busy or is not."""
        while self.clock < end:
            covering = [until for begin, until in self.busy if begin <= self.clock < until]
            if covering:
                self._span(WAITS[0], min(max(covering), end))
            else:
                self._span(WAITS[1], min([begin for begin, _ in self.busy if begin > self.clock] + [end]))

    def _span(self, kind: str, end: float, hop: int = -1) -> None:
        if end > self.clock:
            self.spans.append(Span(self.rank, kind, self.clock, end, hop))
        self.clock = max(self.clock, end)


def _check_ends_agree(exchanges: Sequence[Exchange | None]) -> None:
    if not all(exchanges):
        raise ValueError(f"ranks {[i for i, x in enumerate(exchanges) if x is None]} have fewer exchanges than others")
    sent = {(i, to): size for i, x in enumerate(exchanges) if x for to, size in x.outgoing.items()}
    received = {(source, i): size for i, x in enumerate(exchanges) if x for source, size in x.incoming.items()}
    if sent != received:
        raise ValueError(f"messages (source, destination): bytes sent {sent} are not those received {received}")


@dataclass(frozen=True)
class Timeline:
    """Forward and backward of one layer's attention on all ranks of a case."""

    case: RingCase
    speed: Speed
    forward: Pass
    backward: Pass

    @property
    def passes(self) -> dict[str, Pass]:
        """By name, in order."""
        return {"forward": self.forward, "backward": self.backward}

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward.seconds + self.backward.seconds

    def percent(self, kind: str) -> float:
        """Of all ranks' time, what goes into spans of a kind."""
        spent = sum(played.total(kind) for played in self.passes.values())
        return 100 * spent / (self.seconds * self.case.ranks)

    @property
    def bytes_sent(self) -> list[int]:
        """By each rank."""
        return [f + b for f, b in zip(self.forward.sent, self.backward.sent, strict=True)]

    def summary(self) -> dict[str, float]:
        """What the title says, in numbers."""
        return {
            "forward_ms": 1e3 * self.forward.seconds,
            "backward_ms": 1e3 * self.backward.seconds,
            "compute_percent": self.percent("compute"),
            "exposed_wait_percent": self.percent(WAITS[0]),
            "wait_for_a_rank_percent": self.percent(WAITS[1]),
            "gb_moved": sum(self.bytes_sent) / 1e9,
            "most_gb_sent_by_a_rank": max(self.bytes_sent) / 1e9,
        }


def predict(
    case: RingCase, speed: Speed, records: tuple[list[list[Event]], list[list[Event]]] | None = None
) -> Timeline:
    """The timeline at a speed. records: what `record` gave for the case, to play them at several speeds."""
    forward, backward = record(case) if records is None else records
    return Timeline(
        case, speed, simulate(forward, speed.forward, speed.link), simulate(backward, speed.backward, speed.link)
    )


def sufficient_link(case: RingCase, speed: Speed, records: tuple[Records, Records]) -> float:
    """The least link speed, in bytes per second within 1 percent, that costs less than 1 percent of the time."""
    bound = 1.01 * predict(case, dataclasses.replace(speed, link=float("inf")), records).seconds
    low, high = 1e6, 1e15
    while high > 1.01 * low:
        middle = (low * high) ** 0.5
        if predict(case, dataclasses.replace(speed, link=middle), records).seconds <= bound:
            high = middle
        else:
            low = middle
    return high


# -- what is printed and drawn


def heading(timeline: Timeline) -> str:
    """Time, exposed wait and traffic in a line."""
    case, found = timeline.case, timeline.summary()
    return (
        f"{case}, {case.heads}/{case.kv_heads} heads of {case.head_dim}: predicted {found['forward_ms']:.2f} ms forward"
        f" + {found['backward_ms']:.2f} ms backward, exposed wait {found['exposed_wait_percent']:.1f}%,"
        f" {found['gb_moved']:.2f} GB moved at {timeline.speed.link / 1e9:g} GB/s"
    )


def table(timeline: Timeline) -> str:
    """A line per rank: milliseconds by what they are spent on, and GB sent."""
    columns = ("compute", *WAITS)
    lines = [f"{'rank':>4} " + "".join(f"{name + ', ms':>24}" for name in (*columns, "done")) + f"{'GB sent':>10}"]
    lines.append("-" * len(lines[0]))
    for rank in range(timeline.case.ranks):
        done = [played.finished[rank] for played in timeline.passes.values()]
        spent = [[played.total(kind, rank) for played in timeline.passes.values()] for kind in columns]
        cells = "".join(f"{f'{1e3 * f:.2f} + {1e3 * b:.2f}':>24}" for f, b in (*spent, done))
        lines.append(f"{rank:>4} {cells}{timeline.bytes_sent[rank] / 1e9:>10.3f}")
    return "\n".join(lines)


def draw(path: Path, timeline: Timeline, subtitle: str) -> None:
    """Two rows per rank, compute above transfer; forward on the left and backward on the right, to one scale."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = timeline.case.ranks
    figure = Figure(figsize=(13, 1.7 + 0.42 * ranks), layout="constrained")
    widths = [played.seconds for played in timeline.passes.values()]
    panels = figure.subplots(1, 2, sharey=True, width_ratios=widths)
    for axes, (name, played) in zip(panels, timeline.passes.items(), strict=True):
        for kind, colour in COLOURS.items():
            low, high = (0.12, 0.4) if kind in ("keys", "gradients") else (0.42, 0.88)
            for rank in range(ranks):
                bars = [
                    (1e3 * s.begin, 1e3 * (s.end - s.begin)) for s in played.spans if (s.rank, s.kind) == (rank, kind)
                ]
                place = (rank + 1 - high, high - low)  # ranks downward
                axes.broken_barh(bars, place, facecolor=colour, edgecolor="white", linewidth=0.3)
        for span in played.spans:
            if span.kind == "compute" and span.end - span.begin > 0.012 * sum(widths):
                middle = 1e3 * (span.begin + span.end) / 2
                axes.text(middle, span.rank + 0.35, str(span.hop), size=6, color="white", ha="center", va="center")
        axes.set(title=name, xlabel="ms", xlim=(0, 1e3 * played.seconds), ylim=(ranks, 0))
        axes.title.set_fontsize(9)
        axes.set_yticks([rank + 0.5 for rank in range(ranks)], [f"rank {rank}" for rank in range(ranks)], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    named = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=named, loc="outside lower center", ncols=len(named), fontsize=8, frameon=False)
    figure.suptitle(f"{heading(timeline)}\n{subtitle}", fontsize=9)
    figure.savefig(path, dpi=90)
