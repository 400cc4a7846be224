"""Whole sequences of some heads: an all-to-all over all ranks of a sequence, for layers that carry state over tokens.

Ulysses exchanges tokens for heads among some of the ranks. A recurrence needs every token of a document in order, so
all ranks take part, and what arrives is put into the order of positions:

    2 ranks, zigzag, 8 tokens, 4 heads     in the layers around it     in between
    rank 0                                 tokens 0 1 6 7, all heads   tokens 0 1 2 3 4 5 6 7, heads 0 1
    rank 1                                 tokens 2 3 4 5, all heads   tokens 0 1 2 3 4 5 6 7, heads 2 3

On a grid of ranks the exchange has two steps, along the Ulysses row and then round the ring, so it needs no process
group of its own. Ulysses rank u of ring rank r gets block u * ring + r of the heads. A rank's memory does not grow with
the number of ranks. Both directions are permutations, and each is the gradient of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringflash.ring.message import Message
from ringflash.ring.plan import AttentionPlan
from ringflash.ring.transport import Allocate
from ringflash.ring.watchdog import Label


def sequence_ranks(plan: AttentionPlan) -> int:
    """The number of ranks that share a sequence."""
    return plan.ring.size * (1 if plan.ulysses is None else plan.ulysses.size)


def head_blocks(plan: AttentionPlan) -> list[int]:
    """Which block of the heads each local rank of the ring gets."""
    row = 0 if plan.ulysses is None else plan.ulysses.rank
    return [row * plan.ring.size + rank for rank in plan.ring.local]


def to_heads(parts: Sequence[Tensor], plan: AttentionPlan, label: Label) -> list[Tensor]:
    """parts [local ranks * B, n, F] of the local tokens, to [local ranks, T, F / ranks] of some heads.

    All parts have the same dtype. A part's features are those of its heads, in order. The number of ranks divides them.
    """
    if _is_local(plan, len(parts[0])):
        return [part.reshape(1, -1, part.shape[-1]) for part in parts]
    return list(_Exchange.apply(plan, label, True, *parts))


def to_tokens(x: Tensor, plan: AttentionPlan, label: Label) -> Tensor:
    """x [local ranks, T, F / ranks] of some heads, to [local ranks * B, n, F] of the local tokens.

    Tokens past the end of a sequence get 0.
    """
    rows = x.shape[1] // plan.layout.length
    return x.reshape(rows, -1, x.shape[-1]) if _is_local(plan, rows) else _Exchange.apply(plan, label, False, x)[0]


def _is_local(plan: AttentionPlan, rows: int) -> bool:
    """Whether one rank holds all tokens, in order."""
    return sequence_ranks(plan) == 1 and plan.sequences(rows).order is None


class _Exchange(torch.autograd.Function):
    """`_gathered` or `_scattered`, and the other one as its gradient."""

    @staticmethod
    def forward(ctx, plan: AttentionPlan, label: Label, to_heads: bool, *parts: Tensor):
        ctx.back = plan, label._replace(direction="backward"), not to_heads
        return (_gathered if to_heads else _scattered)(parts, plan, label)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return None, None, None, *_Exchange.apply(*ctx.back, *gradients)


def _gathered(parts: Sequence[Tensor], plan: AttentionPlan, label: Label) -> tuple[Tensor, ...]:
    """Each part [local * B, n, F] as [local, T, F / ranks]."""
    ring, ulysses, ranks = plan.ring, plan.ulysses, sequence_ranks(plan)
    order = plan.sequences(len(parts[0]) // len(ring.local)).order
    x = torch.cat([part.unflatten(-1, (ranks, -1)).movedim(-2, 0) for part in parts], dim=-1)
    if ulysses is not None:  # [ranks, local * B, n, W] to [ring, local * B, S, W]
        x = ulysses.exchange(x.unflatten(0, (ulysses.size, -1)), label.at("exchange of tokens for heads"))
        x = x.movedim(0, 2).flatten(2, 3)
    x = x.unflatten(1, (len(ring.local), -1)).movedim(1, 0).contiguous()
    widths = [part.shape[-1] // ranks for part in parts]
    with ring.receive_buffers(label) as allocate:
        received = _exchanged(x, plan, label, allocate)
        del x
        columns = zip(*(shards.flatten(0, 2).split(widths, dim=-1) for shards in received), strict=True)
        return tuple(_stacked([_ordered(x, order) for x in of_ranks]) for of_ranks in columns)


def _scattered(parts: Sequence[Tensor], plan: AttentionPlan, label: Label) -> tuple[Tensor, ...]:
    """The inverse of `_gathered`, with 0 past the end of a sequence."""
    ring, ulysses, layout = plan.ring, plan.ulysses, plan.layout
    rows, widths = parts[0].shape[1] // layout.length, [part.shape[-1] for part in parts]
    order = plan.sequences(rows).order
    x = parts[0].new_zeros(len(ring.local), ring.size * rows * layout.shard_length, sum(widths))
    for part, into in zip(parts, x.split(widths, dim=-1), strict=True):
        into.copy_(part) if order is None else into.index_copy_(1, order, part)
    x = x.view(len(ring.local), ring.size, rows, layout.shard_length, -1)
    with ring.receive_buffers(label) as allocate:
        x = torch.cat(_exchanged(x, plan, label, allocate), dim=1)
    if ulysses is not None:  # [ring, local * B, S, W] to [ranks, local * B, n, W]
        x = x.unflatten(2, (ulysses.size, -1)).movedim(2, 0)
        x = ulysses.exchange(x, label.at("exchange of heads for tokens")).flatten(0, 1)
    return tuple(part.movedim(0, -2).flatten(-2) for part in x.split(widths, dim=-1))


def _exchanged(x: Tensor, plan: AttentionPlan, label: Label, allocate: Allocate) -> list[Tensor]:
    """Send x[i, r] of local rank i to rank r of the ring. Entry r of result i is what rank r sent to local rank i."""
    ring = plan.ring
    if ring.size == 1:
        return [*x]
    received = [allocate(x.shape[1:], x.dtype) for _ in ring.local]
    steps = [(i, rank, step) for i, rank in enumerate(ring.local) for step in range(1, ring.size)]
    to = [(i, rank, (rank + step) % ring.size) for i, rank, step in steps]
    by = [(i, rank, (rank - step) % ring.size) for i, rank, step in steps]
    transfer = ring.exchange(
        [Message(rank, other, x[i, other], received[i][rank]) for i, rank, other in to],
        [Message(other, rank, received[i][other]) for i, rank, other in by],
        label.at("exchange of tokens and heads"),
    )
    for i, rank in enumerate(ring.local):
        received[i][rank].copy_(x[i, rank])
    transfer.wait()
    return received


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x.clone() if order is None else x.index_select(0, order)


def _stacked(of_ranks: list[Tensor]) -> Tensor:
    return of_ranks[0][None] if len(of_ranks) == 1 else torch.stack(of_ranks)
