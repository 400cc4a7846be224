"""Compiler: the steps of a layer's forward and backward, from routes, shapes and counts of pairs.

`ring.schedule` describes the result. `AttentionPlan.schedules` compiles it once per shape of layers, and `ring.cost`
compiles single ranks to predict the time of a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from ringflash.ring.key_hops import KeyHops
from ringflash.ring.ranges import Range, Ranges
from ringflash.ring.routes import Route
from ringflash.ring.schedule import (
    OWN,
    RESULTS,
    Attend,
    Buffer,
    Call,
    Clear,
    Fork,
    Join,
    Post,
    Receive,
    Rows,
    Schedule,
    Section,
    Send,
    Shape,
    Step,
    Wait,
)


def compile_passes(
    ranks: tuple[int, ...],
    routes: tuple[Route, ...],
    hops: tuple[KeyHops, KeyHops],
    forward_pairs: Sequence[Sequence[int]],
    backward_pairs: Callable[[Range], Sequence[Sequence[int]]],
    shape: Shape,
    writes_gradients: bool,
) -> tuple[Schedule, Schedule]:
    """The forward and the backward of a layer of this shape, for local ranks of a ring.

    hops: those of forward and backward. Pairs are visible (query, key) pairs of each local rank on each hop, in the
    backward with some rows of every shard's keys. writes_gradients: whether one kernel call computes dk and dv, and
    writes them in 16 bits.
    """
    of_forward, of_backward = hops
    length = of_forward.layout.shard_length
    heads = head_sections(routes, length, shape.key_heads)
    sections = heads if len(heads) > 1 else _row_sections(heads[0])  # of the backward
    if writes_gradients:
        sections = tuple(replace(section, written=True) for section in sections)
    gradients = {name: (buffer,) for section in sections for name, buffer in _gradient_buffers(section, shape)}
    of_sections = list(zip(*(backward_pairs(section.rows) for section in sections), strict=True))
    forward = (tuple(forward_steps(rank, x, of_forward, heads)) for rank, x in zip(ranks, forward_pairs, strict=True))
    backward = (
        tuple(backward_steps(rank, x, of_backward, sections)) for rank, x in zip(ranks, of_sections, strict=True)
    )
    return (
        Schedule(ranks, heads, _key_buffers(of_forward, shape), tuple(forward)),
        Schedule(ranks, sections, _key_buffers(of_backward, shape) | gradients, tuple(backward)),
    )


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


def _key_buffers(hops: KeyHops, shape: Shape) -> dict[str, tuple[Buffer, ...]]:
    """Keys and values [rows, B, Hkv, D], so that rows are contiguous, for each buffer in which any rank receives."""
    dims = (shape.key_dim, shape.value_dim)
    rows = {s: max(hops.rows(rank, s) for rank in range(hops.layout.ranks)) for s in (2, 1) if s < hops.number}
    return {
        _keys_of(s): tuple(Buffer((count, shape.batch, shape.key_heads, dim), shape.dtype) for dim in dims)
        for s, count in rows.items()
    }


def _gradient_buffers(section: Section, shape: Shape) -> Iterator[tuple[str, Buffer]]:
    """fp32 buffers, whose rows hold a token's dk and then its dv, [B, heads, D] each."""
    (begin, end), (head, last) = section.rows, section.heads
    row = shape.batch * (last - head) * (shape.key_dim + shape.value_dim)
    names = {section.gradients(0, s) for s in range(1, _hops(section.routes))}
    names |= {section.gradients(rank, 0) for rank in range(len(section.routes))}
    for name in sorted(names - {RESULTS}):
        yield name, Buffer((end - begin, row), torch.float32)


# -- the two passes


def forward_steps(rank: int, pairs: Sequence[int], hops: KeyHops, sections: Sequence[Section]) -> Iterator[Step]:
    """While a hop is computed, the keys of the next hop are sent. pairs: those of each hop."""
    last_stream = sections[-1].stream
    if hops.number > 1:
        yield from _lay_out_keys(rank, hops)
    for s in range(hops.number):
        if s > 0:
            yield Wait(0, f"hop {s}")
        if last_stream:
            yield Fork()
        if s + 1 < hops.number:  # both streams are done with hop s - 1 here, whose buffer this fills
            yield _post_keys(rank, hops, s + 1, last_stream)
        for section in sections:
            yield Attend(section.stream, f"hop {s}", s, section.index, pairs[s], _keys_of(s))
    if last_stream:
        yield Join()
    yield Call(0, "finish", "finish")
    if last_stream:
        yield Fork()  # stream 0 read memory of stream 1, which may reuse it as soon as the pass is over


def backward_steps(
    rank: int, pairs: Sequence[Sequence[int]], hops: KeyHops, sections: Sequence[Section]
) -> Iterator[Step]:
    """Keys are sent as in the forward, and their gradients one hop later. A rank's own keys come last.

    One section's gradients are sent while the kernel adds to the other's. pairs: those of each section and hop.
    """
    last_stream = sections[-1].stream
    order = [*range(1, hops.number), 0]
    if hops.number > 1:
        yield from _lay_out_keys(rank, hops)
        yield _post_keys(rank, hops, 1, 0)
    yield Call(0, "delta", "prepare")  # this and the next steps run while the first keys are sent
    for section in sections:
        if not section.written:
            yield _clear_gradients(rank, section, order[0], 0)
    for s in order:
        if s > 0:
            yield Wait(0, f"hop {s}")
        if last_stream:
            yield Fork()
        if 0 < s < hops.number - 1:
            yield _post_keys(rank, hops, s + 1, last_stream)
        for section in sections:
            if s != order[0]:
                yield Wait(section.stream, _gradients_label((s or hops.number) - 1, section))
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


def _lay_out_keys(rank: int, hops: KeyHops) -> Iterator[Step]:
    """Zero the rows that the first message into a buffer does not fill; then copy own keys to the layout for sending.

    A kernel's tiles extend beyond the edge of a run, where 0 times the contents must be 0.
    """
    rows: list[Rows] = []
    for first in (2, 1):
        coming = ([move.target for move in hops.moves(rank, s)] for s in range(first, hops.number, 2))
        if (filled := next(filter(None, coming), None)) is not None:
            whole = Ranges([Range(0, hops.rows(rank, first))])
            rows += [Rows(_keys_of(first), *r) for r in whole.without(Ranges.covering(filled))]
    yield Clear(0, "clear", tuple(rows))
    yield Call(0, "lay out own keys", "lay_out_keys")


def _post_keys(rank: int, hops: KeyHops, s: int, stream: int) -> Post:
    """Send the keys that hop s needs from the buffer of hop s - 1."""
    here, there = _keys_of(s - 1), _keys_of(s)
    return Post(
        stream,
        f"hop {s}",
        tuple(
            Send(peer, Rows(here, *source), Rows(there, *target))
            for peer in hops.receivers(rank, s)
            for sender, source, target in hops.moves(peer, s)
            if sender == rank
        ),
        tuple(Receive(sender, Rows(there, *target)) for sender, _, target in hops.moves(rank, s)),
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
