"""Schedule: one pass of a layer's attention on a ring, as a list of steps per rank over named buffers.

A plan decides which tokens attend to which, and what is sent. A schedule is the order in which this happens. It has no
tensors, streams or process groups: `ring.execution` runs it, `ring.simulation` predicts its time, and printing draws
it. This is the forward of four ranks, causal, zigzag, with one KV head. `own 0..1 > 1` sends rows 0 and 1 of the rank's
own keys and values to rank 1:

    >>> from ringflash import AttentionPlan, IntervalMask, Layout, Loopback
    >>> plan = AttentionPlan(IntervalMask.causal(16), Layout.zigzag(16, ranks=4), Loopback(4))
    >>> forward, backward = plan.schedules(Shape(1, 1, 1, 64, 64, torch.bfloat16))
    >>> print(forward)
    stream  step              rank 0           rank 1           rank 2           rank 3
         0  clear             .                keys 1 2..3      keys 0 2..3      .
         0  lay out own keys
         0  post hop 1        own 0..1 > 1     own 0..3 > 2     own 0..3 > 3     own 0..3 > 0
         0  attend hop 0      10 pairs         10 pairs         10 pairs         10 pairs
         0  wait hop 1
         0  post hop 2        keys 1 0..3 > 1  keys 1 0..1 > 2  keys 1 0..3 > 3  keys 1 0..3 > 0
         0  attend hop 1      8 pairs          8 pairs          8 pairs          8 pairs
         0  wait hop 2
         0  post hop 3        keys 0 0..3 > 1  keys 0 0..3 > 2  keys 0 0..1 > 3  keys 0 0..3 > 0
         0  attend hop 2      8 pairs          8 pairs          8 pairs          8 pairs
         0  wait hop 3
         0  attend hop 3      8 pairs          8 pairs          8 pairs          8 pairs
         0  finish

With several KV heads, there are two sections, each with half of the heads, on two streams. With one KV head, the
backward has two sections of the keys, on one stream. A section's gradients are sent while the kernel adds to the
other's.

All ranks have the same kinds of steps in the same order; an idle rank has nothing to do in a step. So ranks cannot
deadlock, and a Loopback runs them side by side.

The keys of hop s are in buffer "keys s % 2": those of one other rank, or in some forwards of four (`ring.key_hops`). A
message fills rows of the peer's buffer, and names them as that rank does. The gradients of a hop are in one of two
buffers per section, which alternate: one is added to and sent while the other receives. A rank's own gradients return
into the latter, or into a third buffer if any rank still forwards others' by then. If one call computes all gradients,
as on a ring of one, there is no buffer: the kernel writes the results.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ringflash.ring.ranges import Range
from ringflash.ring.routes import Route

OWN = "own"  # this rank's keys and values, in the layout in which they are sent
RESULTS = "results"  # dk and dv as the pass returns them


class Rows(NamedTuple):
    """Rows begin..end - 1 of a buffer, which has one row per token."""

    buffer: str
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.buffer} {self.begin}..{self.end - 1}"


class Send(NamedTuple):
    """Rows of a local buffer, sent to rows of a buffer of the rank `peer`."""

    peer: int
    source: Rows
    target: Rows


class Receive(NamedTuple):
    """Rows of a local buffer that the rank `peer` sends."""

    peer: int
    target: Rows


@dataclass(frozen=True, slots=True)
class Post:
    """Start an exchange of messages. A `Wait` with the same label ends it."""

    stream: int
    label: str
    sends: tuple[Send, ...] = ()
    receives: tuple[Receive, ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """Make the stream wait for the exchange with this label."""

    stream: int
    label: str


@dataclass(frozen=True, slots=True)
class Clear:
    """Zero rows that a kernel adds to first, or that it reads although no message fills them (0 x NaN is NaN)."""

    stream: int
    label: str
    rows: tuple[Rows, ...] = ()


@dataclass(frozen=True, slots=True)
class Attend:
    """Run the kernel on a section of a hop's keys.

    keys: the buffer with the hop's keys and values. gradients: the buffer of their gradients, in the backward, or
    RESULTS. pairs: visible (query, key) pairs over the masks' batch rows.
    """

    stream: int
    label: str
    hop: int
    section: int
    pairs: int
    keys: str
    gradients: str = ""


@dataclass(frozen=True, slots=True)
class Fork:
    """Make stream 1 wait for the work queued on stream 0."""

    stream: int = 0
    label: str = "fork"


@dataclass(frozen=True, slots=True)
class Join:
    """Make stream 0 wait for the work queued on stream 1."""

    stream: int = 0
    label: str = "join"


@dataclass(frozen=True, slots=True)
class Call:
    """Other work on this rank. `method` is the name of a method of the `execution.Worker` that runs the schedule."""

    stream: int
    label: str
    method: str
    section: int = 0


Step = Post | Wait | Clear | Attend | Fork | Join | Call


@dataclass(frozen=True)
class Section:
    """KV heads and rows of every shard that one stream processes; routes count from the first of these rows.

    written: one call computes their gradients and writes them in 16 bits.
    """

    index: int
    stream: int
    heads: Range
    rows: Range
    routes: tuple[Route, ...]
    written: bool = False

    @functools.cached_property
    def returned_early(self) -> bool:
        """Whether any rank still forwards others' gradients on a hop after some of its own have returned."""
        size, first = len(self.routes), [route.first_return for route in self.routes]
        return any(
            bool(self.routes[(rank - s) % size].gradients[s])
            for rank in range(size)
            if first[rank]
            for s in range(first[rank] + 1, size)
        )

    def gradients(self, rank: int, s: int) -> str:
        """The name of the buffer that accumulates a rank's gradients of hop s. All ranks use the same name.

        A rank's own gradients, of hop 0, return into the buffer that is next in turn, unless that is still needed.
        """
        if self.written:
            return RESULTS
        if s == 0 and self.returned_early:
            return f"returned {self.index}"
        return f"gradients {self.index}.{(s or self.routes[rank].first_return + 1) % 2}"


@dataclass(frozen=True)
class Shape:
    """What a schedule depends on apart from its plan: batch rows per rank, heads, head sizes, and dtype."""

    batch: int
    query_heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


class Buffer(NamedTuple):
    """Shape and dtype of one tensor of a receive buffer."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Schedule:
    """One pass on the local ranks of a ring.

    buffers: the tensors of each receive buffer, in the order in which every rank allocates them. steps[i]: the steps of
    local rank ranks[i].
    """

    ranks: tuple[int, ...]
    sections: tuple[Section, ...]
    buffers: dict[str, tuple[Buffer, ...]]
    steps: tuple[tuple[Step, ...], ...]

    @property
    def streams(self) -> int:
        """The number of streams, 1 or 2."""
        return 1 + self.sections[-1].stream

    def __str__(self) -> str:
        rows = [["step", *(f"rank {rank}" for rank in self.ranks)]]
        rows += [[_name(steps[0]), *map(_detail, steps)] for steps in zip(*self.steps, strict=True)]
        streams = ["stream", *(str(step.stream) for step in self.steps[0])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            f"{stream:>6}  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
            for stream, row in zip(streams, rows, strict=True)
        )
        return "\n".join(line.rstrip() for line in lines)


def _name(step: Step) -> str:
    match step:
        case Call() | Fork() | Join() | Clear():
            return step.label
        case _:
            return f"{type(step).__name__.lower()} {step.label}"


def _detail(step: Step) -> str:
    """What one rank does in a step; "." for nothing."""
    match step:
        case Post():
            return ", ".join(f"{send.source} > {send.peer}" for send in step.sends) or "."
        case Clear():
            return ", ".join(map(str, step.rows)) or "."
        case Attend():
            return f"{step.pairs} pairs" if step.pairs else "."
    return ""
