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

With several KV heads there are two sections, a half of the heads each, on two streams; with one, the backward has two
sections of the keys, on one stream. A section's gradients travel while the kernel adds to the other's.

All ranks' lists have the same kinds of step at the same places, with nothing to do where a rank is idle. So ranks
cannot deadlock, and a Loopback runs them side by side.

Keys of hop s lie in buffer "keys s % 2". A message fills rows of the peer's buffer of the same name. Gradients of a hop
lie in one of two buffers per section, which take turns: one is added to and sent while the other receives. A rank's own
gradients return into the latter, or into a third buffer where any rank still carries others' by then. Where one call
computes all of them, as on a ring of one, there is no buffer: the kernel writes them into the results.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from ringflash.ring.ranges import Range, Ranges
from ringflash.ring.routes import Route

if TYPE_CHECKING:
    from ringflash.ring.plan import AttentionPlan

OWN = "own"  # this rank's keys and values, in the layout in which they are sent
RESULTS = "results"  # dk and dv as the pass returns them


class Rows(NamedTuple):
    """Rows begin..end - 1 of a buffer, which has one row per token of a shard or section."""

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


# -- compiling


def compile_passes(plan: AttentionPlan, shape: Shape) -> tuple[Schedule, Schedule]:
    """The forward and the backward of a layer of this shape, for the local ranks of the plan's ring."""
    ranks, routes, length = plan.ring.local, plan.routes, plan.layout.shard_length
    heads = head_sections(routes, length, shape.key_heads)
    sections = heads if len(heads) > 1 else _row_sections(heads[0])  # of the backward
    if plan.writes_gradients(shape.dtype):
        sections = tuple(replace(section, written=True) for section in sections)
    keys = _key_buffers(routes, length, shape)
    gradients = {name: (buffer,) for section in sections for name, buffer in _gradient_buffers(section, shape)}
    forward, backward = [], []
    for i, rank in enumerate(ranks):
        of_hops = [hops[i].pairs for hops in plan.hops]
        of_sections = [[hops[i].pairs for hops in plan.hops_of(section.rows)] for section in sections]
        forward.append(tuple(forward_steps(rank, of_hops, routes, heads)))
        backward.append(tuple(backward_steps(rank, of_sections, routes, sections)))
    return Schedule(ranks, heads, keys, tuple(forward)), Schedule(ranks, sections, keys | gradients, tuple(backward))


def head_sections(routes: tuple[Route, ...], length: int, key_heads: int) -> tuple[Section, ...]:
    """Halves of the KV heads, on two streams; a single section if nothing is sent or if there is one KV head."""
    rows, middle = Range(0, length), key_heads // 2
    if _hops(routes) == 1 or key_heads == 1:
        return (Section(0, 0, Range(0, key_heads), rows, routes),)
    halves = Range(0, middle), Range(middle, key_heads)
    return tuple(Section(i, i, half, rows, routes) for i, half in enumerate(halves))


def _row_sections(whole: Section) -> tuple[Section, ...]:
    """Two sections of the keys on one stream, since they add to the same dq. Each hides the other's gradient transfer.

    The sections are a quarter of the keys and the rest. With zigzag, a hop sees the first half of the keys or all of
    them, so it has work in both sections.
    """
    length = whole.rows.end
    if _hops(whole.routes) == 1 or length < 2:
        return (whole,)
    quarter = max(1, length // 4)
    return tuple(
        Section(i, 0, whole.heads, rows, tuple(route.within(*rows) for route in whole.routes))
        for i, rows in enumerate((Range(0, quarter), Range(quarter, length)))
    )


def _hops(routes: Sequence[Route]) -> int:
    """The number of hops. On later ones, no rank sees anything."""
    return 1 + max(route.last_hop for route in routes)


def _key_buffers(routes: Sequence[Route], length: int, shape: Shape) -> dict[str, tuple[Buffer, ...]]:
    """Keys and values [S, B, Hkv, D], so that rows are contiguous, for each buffer in which any rank receives."""
    dims = (shape.key_dim, shape.value_dim)
    kv = tuple(Buffer((length, shape.batch, shape.key_heads, dim), shape.dtype) for dim in dims)
    return {_keys_of(s): kv for s in (2, 1) if any(any(route.keys[s::2]) for route in routes)}


def _gradient_buffers(section: Section, shape: Shape) -> Iterator[tuple[str, Buffer]]:
    """fp32 buffers, whose rows hold a token's dk and then its dv, [B, heads, D] each."""
    (begin, end), (head, last) = section.rows, section.heads
    row = shape.batch * (last - head) * (shape.key_dim + shape.value_dim)
    names = {section.gradients(0, s) for s in range(1, _hops(section.routes))}
    names |= {section.gradients(rank, 0) for rank in range(len(section.routes))}
    for name in sorted(names - {RESULTS}):
        yield name, Buffer((end - begin, row), torch.float32)


# -- the two passes


def forward_steps(
    rank: int, pairs: Sequence[int], routes: Sequence[Route], sections: Sequence[Section]
) -> Iterator[Step]:
    """While a hop is computed, the keys of the next hop are sent. pairs: those of each hop."""
    hops, last_stream = _hops(routes), sections[-1].stream
    if hops > 1:
        yield from _lay_out_keys(rank, routes, sections)
    for s in range(hops):
        if s > 0:
            yield Wait(0, f"hop {s}")
        if last_stream:
            yield Fork()
        if s + 1 < hops:  # both streams are done with hop s - 1 here, whose buffer this fills
            yield _post_keys(rank, routes, s + 1, last_stream)
        for section in sections:
            yield Attend(section.stream, f"hop {s}", s, section.index, pairs[s], _keys_of(s))
    if last_stream:
        yield Join()
    yield Call(0, "finish", "finish")
    if last_stream:
        yield Fork()  # stream 0 read memory of stream 1, which may reuse it as soon as the pass is over


def backward_steps(
    rank: int, pairs: Sequence[Sequence[int]], routes: Sequence[Route], sections: Sequence[Section]
) -> Iterator[Step]:
    """Keys are sent as in the forward, and their gradients one hop later. A rank's own keys come last.

    One section's gradients are sent while the kernel adds to the other's. pairs: those of each section and hop.
    """
    hops, last_stream = _hops(routes), sections[-1].stream
    order = [*range(1, hops), 0]
    if hops > 1:
        yield from _lay_out_keys(rank, routes, sections)
        yield _post_keys(rank, routes, 1, 0)
    yield Call(0, "delta", "prepare")  # this and the next steps run while the first keys are sent
    for section in sections:
        if not section.written:
            yield _clear_gradients(rank, section, order[0], 0)
    for s in order:
        if s > 0:
            yield Wait(0, f"hop {s}")
        if last_stream:
            yield Fork()
        if 0 < s < hops - 1:
            yield _post_keys(rank, routes, s + 1, last_stream)
        for section in sections:
            if s != order[0]:
                yield Wait(section.stream, _gradients_label((s or hops) - 1, section))
                yield _clear_gradients(rank, section, s, section.stream)
            visible, here = pairs[section.index][s], section.gradients(rank, s)
            yield Attend(section.stream, f"hop {s}", s, section.index, visible, _keys_of(s), here)
            if s > 0:
                yield _post_gradients(rank, section, s)
    for section in sections:
        yield Call(section.stream, "round", "round", section.index)
    if last_stream:
        yield Join()


def _keys_of(s: int) -> str:
    """The buffer with the keys of hop s."""
    return OWN if s == 0 else f"keys {s % 2}"


def _gradients_label(s: int, section: Section) -> str:
    return f"gradients of hop {s}, section {section.index}"


def _lay_out_keys(rank: int, routes: Sequence[Route], sections: Sequence[Section]) -> Iterator[Step]:
    """Zero the rows that the first message into a buffer does not fill; then copy own keys to the layout for sending.

    A kernel's tiles extend beyond the edge of a run, where 0 times the contents must be 0.
    """
    size, whole, rows = len(routes), Ranges([Range(0, sections[-1].rows.end)]), []
    for first in (2, 1):
        coming = (routes[(rank - s) % size].keys[s] for s in range(first, size, 2))
        if (filled := next(filter(None, coming), None)) is not None:
            rows += [Rows(_keys_of(first), *r) for r in whole.without(filled)]
    yield Clear(0, "clear", tuple(rows))
    yield Call(0, "lay out own keys", "lay_out_keys")


def _post_keys(rank: int, routes: Sequence[Route], s: int, stream: int) -> Post:
    """Send the keys that hop s needs from the buffer of hop s - 1."""
    size, here, there = len(routes), _keys_of(s - 1), _keys_of(s)
    leaving, coming = routes[(rank - s + 1) % size].keys[s], routes[(rank - s) % size].keys[s]
    return Post(
        stream,
        f"hop {s}",
        tuple(Send((rank + 1) % size, Rows(here, *r), Rows(there, *r)) for r in leaving),
        tuple(Receive((rank - 1) % size, Rows(there, *r)) for r in coming),
    )


def _clear_gradients(rank: int, section: Section, s: int, stream: int) -> Clear:
    """Zero the gradients that hop s adds to and that no other rank has added to."""
    size = len(section.routes)
    route = section.routes[(rank - s) % size]
    added_to = route.gradients[s] if s > 0 else Ranges([Range(0, section.rows.end - section.rows.begin)])
    fresh = added_to.without(route.forwarded[s - 1] if s > 0 else route.all_returned)
    return Clear(stream, f"clear {s}", tuple(Rows(section.gradients(rank, s), *r) for r in fresh))


def _post_gradients(rank: int, section: Section, s: int) -> Post:
    """Send the gradients of hop s: to the next rank if its hop adds to them, otherwise to their owner."""
    size, routes = len(section.routes), section.routes
    owner, after, before = (rank - s) % size, (rank + 1) % size, (rank - 1) % size
    here = section.gradients(rank, s)
    outgoing = (after, s + 1, routes[owner].forwarded[s]), (owner, 0, routes[owner].returned[s])
    incoming = (
        (before, s + 1, routes[(before - s) % size].forwarded[s]),
        ((rank + s) % size, 0, routes[rank].returned[s]),
    )
    return Post(
        section.stream,
        _gradients_label(s, section),
        tuple(
            Send(peer, Rows(here, *r), Rows(section.gradients(peer, hop), *r)) for peer, hop, rs in outgoing for r in rs
        ),
        tuple(Receive(peer, Rows(section.gradients(rank, hop), *r)) for peer, hop, rs in incoming for r in rs),
    )
