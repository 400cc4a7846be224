"""Ulysses: tokens of all heads on each rank, exchanged for all tokens of some heads (arXiv:2309.14509).

Inside a node an all-to-all is cheap; across nodes a ring hides its transfers. Together, ranks form a grid: a ring shard
belongs to a row of `size` ranks, which split its tokens in order, and each column is a ring over some of the heads.

    2 x 2 ranks, 8 tokens, 4 heads       before                    in attention
    rank 0 (ring 0, ulysses 0)           tokens 0 1, all heads     tokens 0 1 2 3, heads 0 1   -- ring with rank 2
    rank 1 (ring 0, ulysses 1)           tokens 2 3, all heads     tokens 0 1 2 3, heads 2 3   -- ring with rank 3
    rank 2 (ring 1, ulysses 0)           tokens 4 5, all heads     tokens 4 5 6 7, heads 0 1
    rank 3 (ring 1, ulysses 1)           tokens 6 7, all heads     tokens 4 5 6 7, heads 2 3

Where there are fewer KV heads than ranks in a row, each goes to several ranks, and their gradients add up in fp32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.ring.transport import Process
from ringflash.ring.watchdog import Label, Pending, Watchdog


class Ulysses:
    """The ranks that share a ring shard; one process per rank, over a torch.distributed group.

    The watchdog, where given, records every exchange. label: layer, pass and what is exchanged.
    """

    def __init__(self, group: dist.ProcessGroup, watchdog: Watchdog | None = None) -> None:
        self.process = Process.this()
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.watchdog = watchdog

    def queries(self, x: Tensor, label: Label) -> Tensor:
        """[B, s, H, ...] of this rank's tokens to [B, size * s, H / size, ...] of the ring shard's."""
        batch, tokens, heads, *rest = x.shape
        received = self._exchange(x.unflatten(2, (self.size, heads // self.size)).movedim(2, 0), label)
        return received.movedim(0, 1).reshape(batch, self.size * tokens, heads // self.size, *rest)

    def tokens(self, x: Tensor, label: Label) -> Tensor:
        """The inverse of `queries`."""
        return self._exchange(x.unflatten(1, (self.size, -1)).movedim(1, 0), label).movedim(0, 2).flatten(2, 3)

    def keys(self, x: Tensor, label: Label) -> Tensor:
        """As `queries`, for KV heads: with fewer than ranks, each goes to size / H ranks."""
        return self.queries(x.repeat_interleave(max(1, self.size // x.shape[2]), dim=2), label)

    def key_gradients(self, x: Tensor, heads: int, label: Label) -> Tensor:
        """The inverse of `keys` for fp32 gradients, to `heads` heads: what several ranks found for one is summed."""
        return self.tokens(x, label).unflatten(2, (heads, -1)).sum(3)

    def own(self, x: Tensor) -> Tensor:
        """This rank's part of x [Hq], which has one entry per query head."""
        return x.unflatten(0, (self.size, -1))[self.rank]

    def _exchange(self, x: Tensor, label: Label) -> Tensor:
        """Entry r of x [size, ...] goes to rank r, and what comes from it takes its place; nothing hides this."""
        self.process.check()
        outgoing = x.contiguous()
        incoming = torch.empty_like(outgoing)
        work = dist.all_to_all_single(incoming, outgoing, group=self.group, async_op=True)
        if self.watchdog is None:
            work.wait()
            return incoming
        others = Pending(tuple(rank for rank in dist.get_process_group_ranks(self.group) if rank != dist.get_rank()))
        size = incoming.nbytes // self.size * (self.size - 1)
        self.watchdog.wait([work], "ulysses", label, lambda: others, size, incoming.device)
        return incoming


def heads_refusal(size: int, heads: int, kv_heads: int) -> str | None:
    """None, or why `size` ranks cannot share these heads."""
    if heads % size:
        return f"{heads} query heads do not divide among ulysses={size} ranks"
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} KV heads neither divide among ulysses={size} ranks nor are a divisor of them"
    return None
