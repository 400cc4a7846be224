"""Ulysses: each rank exchanges some tokens of all heads for all tokens of some heads (arXiv:2309.14509).

An all-to-all is cheap within a node, while a ring hides its transfers across nodes. Combined, the ranks form a grid: a
ring shard belongs to a row of `size` ranks, which split its tokens in order, and each column is a ring over some heads.

    2 x 2 ranks, 8 tokens, 4 heads       before                    in attention
    rank 0 (ring 0, ulysses 0)           tokens 0 1, all heads     tokens 0 1 2 3, heads 0 1   -- ring with rank 2
    rank 1 (ring 0, ulysses 1)           tokens 2 3, all heads     tokens 0 1 2 3, heads 2 3   -- ring with rank 3
    rank 2 (ring 1, ulysses 0)           tokens 4 5, all heads     tokens 4 5 6 7, heads 0 1
    rank 3 (ring 1, ulysses 1)           tokens 6 7, all heads     tokens 4 5 6 7, heads 2 3

If there are fewer KV heads than ranks in a row, each head goes to several ranks, whose gradients are summed in fp32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringflash.ring.transport import Process, process_group
from ringflash.ring.watchdog import Label, Pending, Watchdog


class Ulysses:
    """The ranks that share a ring shard, one process per rank, over a torch.distributed group or a DeviceMesh.

    watchdog: records every exchange. label, in each method: layer, pass and tensor, for reports.
    """

    def __init__(self, group: dist.ProcessGroup | DeviceMesh | None = None, watchdog: Watchdog | None = None) -> None:
        self.process = Process.this()
        self.group = process_group(group)
        self.size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self.watchdog = watchdog

    def queries(self, x: Tensor, label: Label) -> Tensor:
        """x [B, s, H, ...] of this rank's tokens to [B, size * s, H / size, ...] of the ring shard's tokens."""
        batch, tokens, heads, *rest = x.shape
        received = self.exchange(x.unflatten(2, (self.size, heads // self.size)).movedim(2, 0), label)
        return received.movedim(0, 1).reshape(batch, self.size * tokens, heads // self.size, *rest)

    def tokens(self, x: Tensor, label: Label) -> Tensor:
        """The inverse of `queries`."""
        return self.exchange(x.unflatten(1, (self.size, -1)).movedim(1, 0), label).movedim(0, 2).flatten(2, 3)

    def keys(self, x: Tensor, label: Label) -> Tensor:
        """`queries` for KV heads: if there are fewer heads H than ranks, each goes to size / H ranks."""
        return self.queries(x.repeat_interleave(max(1, self.size // x.shape[2]), dim=2), label)

    def key_gradients(self, x: Tensor, heads: int, label: Label) -> Tensor:
        """The inverse of `keys` for fp32 gradients of `heads` heads; those of one head on several ranks are summed."""
        return self.tokens(x, label).unflatten(2, (heads, -1)).sum(3)

    def own(self, x: Tensor) -> Tensor:
        """This rank's entries of x [Hq], which has one per query head."""
        return x.unflatten(0, (self.size, -1))[self.rank]

    def exchange(self, x: Tensor, label: Label) -> Tensor:
        """Send entry r of x [size, ...] to rank r, and return what came from each rank. Nothing overlaps with this."""
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
