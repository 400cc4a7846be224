"""Decoding over a KV cache that the ranks of a ring share: each token's keys and values stay on one rank.

A document is read in chunks (prefill), each sharded by a layout as in training. The chunk's queries are sent to all
ranks, attend to the keys there, and the partial results return to the queries' rank, which combines them. After that,
every rank computes the same new tokens, so all ranks have their queries already: each attends to its own keys, and one
exchange combines the results.

    prefill   rank r   its tokens' q -> all ranks     attend to own keys     (out, lse) -> the rank of the queries
    decode    rank r   the new token's q              attend to own keys     (out, lse) -> all ranks

`CachePlan` (ring.cache_plan) decides which rank stores which new keys. Partial results are combined as in
`partial.merge`, in rank order on every rank, so all ranks get the same bits. Without a ring, one rank holds all keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash import kernels
from ringflash.intervals import Intervals
from ringflash.kernels import decode
from ringflash.kernels.checks import like_out
from ringflash.partial import Partial, merge_sink
from ringflash.ring.cache_plan import FEW, RankStep, Step
from ringflash.ring.message import Message
from ringflash.ring.transport import Allocate, Ring, Transfer
from ringflash.ring.watchdog import Label


class LayerCache:
    """One layer's keys and values on the local ranks, allocated once: k [B, rows, Hkv, D] and v [B, rows, Hkv, Dv]."""

    def __init__(self, ranks: int, rows: int, k: Tensor, v: Tensor, batch: int) -> None:
        """ranks: the number of local ranks. k, v [..., Hkv, D]: examples, for heads, head size, dtype and device."""
        self.k, self.v = (
            [torch.empty(batch, rows, *x.shape[2:], dtype=x.dtype, device=x.device) for _ in range(ranks)]
            for x in (k, v)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all local ranks."""
        return sum(x.nbytes for x in (*self.k, *self.v))

    def move(self, i: int, step: RankStep) -> None:
        """Move the rows of local rank i that a step keeps to the front; does nothing if it moves none."""
        if step.kept is not None:
            for held in (self.k[i], self.v[i]):
                held[:, : step.at] = held[:, step.kept].clone()

    def write(self, i: int, step: RankStep, k: Tensor, v: Tensor) -> None:
        """Store local rank i's part of new k and v [B, n, Hkv, D]."""
        self.move(i, step)
        for held, new in ((self.k[i], k), (self.v[i], v)):
            held[:, step.at : step.rows] = new[:, step.own]


@dataclass(frozen=True, eq=False)
class DeviceStep:
    """The step of one new token on a ring of one, with its numbers in persistent device tensors.

    Kernels that read them can be captured as a CUDA graph and replayed for the next token. row: int64 [1], the row of
    its key and value. seen: start and end, int32 [1, 1], of the rows that it sees.
    """

    row: Tensor
    seen: Intervals

    @classmethod
    def on(cls, device: torch.device) -> DeviceStep:
        """Tensors that no step has been copied to yet."""
        start, end = torch.zeros(2, 1, 1, dtype=torch.int32, device=device)
        return cls(torch.zeros(1, dtype=torch.int64, device=device), Intervals.of_queries(start, end))

    def take(self, step: Step) -> None:
        """Copy a step's numbers, without a host synchronisation."""
        self.row.fill_(step.ranks[0].at)
        self.seen.start.copy_(step.ranks[0].seen[0].start)
        self.seen.end.copy_(step.ranks[0].seen[0].end)


@dataclass(frozen=True, eq=False)
class Attention:
    """A layer's settings for attention to its cache. kernel: as in `ring_attention`. name: the layer's, for reports."""

    ring: Ring
    scale: float
    softcap: float | None = None
    sink: Tensor | None = None
    kernel: str = "auto"
    name: str = "attention"


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, steps: Sequence[Step], attention: Attention
) -> Tensor:
    """Store new keys and values, and attend to all keys that new queries see, without gradients.

    q [B, n, Hq, D], k [B, n, Hkv, D], v [B, n, Hkv, Dv]. If the tokens are sharded (prefill), local ranks are outermost
    in the batch; otherwise the tensors are the same on all ranks. Returns out [B, n, Hq, Dv] in q's dtype.
    """
    if steps[0].sharded:
        return _prefill(q, k, v, cache, steps[0], attention)
    pieces = [slice(step.begin, step.end) for step in steps]
    found = [_decode(q[:, x], k[:, x], v[:, x], cache, step, attention) for x, step in zip(pieces, steps, strict=True)]
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def attention_on_device(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, step: DeviceStep, attention: Attention
) -> Tensor:
    """`cached_attention` of one new token on a ring of one, without its row and its bounds on the host.

    Rows that the step of `DeviceStep.take` moves must already have been moved.
    """
    for held, new in ((cache.k[0], k), (cache.v[0], v)):
        held.index_copy_(1, step.row, new)
    whole = RankStep(None, slice(0, 1), 0, cache.k[0].shape[1], (step.seen,))
    return _attend(q, cache, 0, whole, 0, attention, sink=attention.sink, out_dtype=q.dtype).out


def _decode(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, step: Step, attention: Attention) -> Tensor:
    """Attention of queries that every rank has: each attends to its keys, and one exchange sends all parts to all."""
    ring = attention.ring
    for i, rank_step in enumerate(step.ranks):
        cache.write(i, rank_step, k, v)
    if ring.size == 1:
        return _attend(q, cache, 0, step.ranks[0], 0, attention, sink=attention.sink, out_dtype=q.dtype).out
    label = Label(attention.name, "decode")
    with ring.receive_buffers(label) as allocate:
        parts = [_Parts.of(allocate, ring.size, like_out(q, v)) for _ in ring.local]
        messages = [x.messages for x in parts]
        for i, rank in enumerate(ring.local):
            found = _attend(q, cache, i, step.ranks[i], 0, attention)
            parts[i].all.out[rank].copy_(found.out)
            parts[i].all.lse[rank].copy_(found.lse)
        own = [[x[rank]] * ring.size for rank, x in zip(ring.local, messages, strict=True)]
        _to_all(ring, own, messages, label).wait()
        return decode.combine(parts[0].all, sink=attention.sink, out_dtype=q.dtype).out


def _prefill(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, step: Step, attention: Attention) -> Tensor:
    """Attention of each rank's own queries: they are sent to all ranks, and the partial results return."""
    ring, label = attention.ring, Label(attention.name, "prefill")
    by_rank = list(zip(*(x.chunk(len(ring.local)) for x in (q, k, v)), strict=True))
    for i, rank_step in enumerate(step.ranks):
        cache.write(i, rank_step, *by_rank[i][1:])
    if ring.size == 1:
        return _attend(q, cache, 0, step.ranks[0], 0, attention, sink=attention.sink, out_dtype=q.dtype).out
    with ring.receive_buffers(label) as allocate:
        shape = by_rank[0][0].shape
        queries = [allocate((ring.size, *shape), q.dtype) for _ in ring.local]
        parts = [_Parts.of(allocate, ring.size, like_out(by_rank[0][0], v)) for _ in ring.local]
        messages, returned = [x.messages for x in parts], []
        for i, rank in enumerate(ring.local):
            queries[i][rank].copy_(by_rank[i][0])
            returned.append([x if r == rank else torch.empty_like(x) for r, x in enumerate(messages[i])])

        def attend(i: int, source: int) -> None:
            part = _attend(queries[i][source], cache, i, step.ranks[i], source, attention)
            torch.cat([part.out.flatten(), part.lse.flatten()], out=returned[i][source])

        own = [[x[rank]] * ring.size for rank, x in zip(ring.local, queries, strict=True)]
        travelling = _to_all(ring, own, queries, label.at("queries"))
        for i, rank in enumerate(ring.local):  # while the other ranks' queries are sent
            attend(i, rank)
        travelling.wait()
        for i, rank in enumerate(ring.local):
            for source in range(ring.size):
                if source != rank:
                    attend(i, source)
        _to_all(ring, returned, messages, label.at("results")).wait()
        out = [decode.combine(x.all, sink=attention.sink, out_dtype=q.dtype).out for x in parts]
    return torch.cat(out) if len(out) > 1 else out[0]


def _attend(
    q: Tensor,
    cache: LayerCache,
    i: int,
    step: RankStep,
    source: int,
    attention: Attention,
    sink: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Partial:
    """Attention of rank `source`'s queries to the keys of local rank i."""
    seen, k, v = step.seen[source], cache.k[i], cache.v[i]
    scale, softcap = attention.scale, attention.softcap
    if q.shape[1] <= FEW:
        name = "blocked" if attention.kernel == "blocked" else "auto"
        splits = decode.parts(q, k, v, ((seen.start, seen.end),), scale=scale, softcap=softcap, kernel=name)
        return decode.combine(splits, sink=sink, out_dtype=out_dtype)
    kernel = kernels.select(q, k, softcap, attention.kernel, value_dim=v.shape[3])
    out = None if sink is not None else torch.empty(*q.shape[:3], v.shape[3], dtype=out_dtype, device=q.device)
    k, v = k[:, : step.rows], v[:, : step.rows]
    found = kernel.forward(q, k, v, seen, scale=scale, softcap=softcap, out=out)
    if sink is not None:
        merge_sink(found, sink)
    return Partial(found.out.to(out_dtype), found.lse)


@dataclass(frozen=True, eq=False)
class _Parts:
    """Partials [ranks, B, n, Hq, Dv] by the rank that computed them; out and lse of one rank are one message."""

    messages: Tensor
    all: Partial

    @classmethod
    def of(cls, allocate: Allocate, ranks: int, like: Tensor) -> _Parts:
        batch, tokens, heads, dim = like.shape
        messages = allocate((ranks, batch * tokens * heads * (dim + 1)), torch.float32)
        out, lse = messages[:, : like.numel()], messages[:, like.numel() :]
        return cls(messages, Partial(out.view(-1, *like.shape), lse.view(-1, batch, heads, tokens)))


def _to_all(ring: Ring, sent: list[list[Tensor]], received: Sequence[Tensor], label: Label) -> Transfer:
    """Start sending sent[i][r] from local rank i to every other rank r, which receives it as entry [i's rank]."""
    outgoing, incoming = [], []
    for rank, messages, buffer in zip(ring.local, sent, received, strict=True):
        for other in range(ring.size):
            if other != rank:
                outgoing.append(Message(rank, other, messages[other], target=buffer[rank]))
                incoming.append(Message(other, rank, buffer[other]))
    return ring.exchange(outgoing, incoming, label)
