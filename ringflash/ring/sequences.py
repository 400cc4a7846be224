"""Sequences: all shards' tokens in the order of positions, and the documents among them, for layers with a recurrence.

    two shards in a zigzag layout     tokens 0 1 6 7 | 2 3 4 5
    order                             0 1 4 5 6 7 2 3               where each position is in the shards
    documents of 5 and 3 tokens       cu_seqlens 0 5 8

An `AttentionPlan` makes them once a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.intervals import to_device
from ringflash.layout import Layout

CHUNK = 64  # tokens that kernels of linear attention process at once


@dataclass(frozen=True, eq=False)
class Sequences:
    """The T tokens of all batch rows, row by row, in the order of positions.

    order: the index of each token in the shards [ranks, rows, S], int64 [T]; None if the shards are in that order.
    lengths: the number of tokens of each document. cu_seqlens: the first token of each document, and T, int64
    [documents + 1]. chunk_indices: the document of each chunk of CHUNK tokens, and the chunk's number in it, int64
    [chunks, 2]. The tensors are on the ring's device.
    """

    order: Tensor | None
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    chunk_indices: Tensor

    @classmethod
    def of(cls, layout: Layout, starts: Tensor, device: torch.device) -> Sequences:
        """The sequences of a layout. starts: where documents begin, bool [rows, length]."""
        rows, length = starts.shape
        positions = torch.stack([layout.positions(rank) for rank in range(layout.ranks)]).flatten()
        place = torch.empty_like(positions)
        place[positions] = torch.arange(len(positions))
        place = place[:length]
        source, index = place // layout.shard_length, place % layout.shard_length
        order = ((source * rows + torch.arange(rows)[:, None]) * layout.shard_length + index).flatten()
        in_order = len(positions) == length and torch.equal(order, torch.arange(rows * length))
        cu_seqlens = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([rows * length])])
        lengths = cu_seqlens.diff()
        counts = (lengths + CHUNK - 1) // CHUNK
        document = torch.arange(len(counts)).repeat_interleave(counts)
        chunk = torch.arange(len(document)) - (counts.cumsum(0) - counts)[document]
        return cls(
            order=None if in_order else to_device(order, device),
            lengths=tuple(lengths.tolist()),
            cu_seqlens=to_device(cu_seqlens, device),
            chunk_indices=to_device(torch.stack([document, chunk], dim=1), device),
        )
