"""Decoding over a KV cache that the ranks of a ring share: each token's keys and values stay on one rank.

A document is read in chunks (prefill), each sharded by a layout as in training. The chunk's queries are sent to all
ranks, attend to the keys there, and the partial results return to the queries' rank, which combines them. After that,
every rank computes the same new tokens, so all ranks have their queries already: each attends to its own keys, and one
exchange combines the results.

    prefill   rank r   its tokens' q -> all ranks     attend to own keys     (out, lse) -> the rank of the queries
    decode    rank r   the new token's q              attend to own keys     (out, lse) -> all ranks

The keys of a new token go to the rank with the fewest, so all ranks hold about the same number. Partial results combine
as in `partial.merge`, in rank order on every rank, so all ranks get the same bits. Without a ring, one rank holds all.

Layers with a sliding window keep only the window: when their rows are full, rows that no later query sees are dropped.

    >>> from ringflash.ring.transport import Loopback
    >>> plan = CachePlan(Loopback(2), capacity=10, chunk=8)
    >>> plan.begin(5, Layout.zigzag(5, ranks=2)), plan.begin(1), plan.begin(1)  # a document of 5 tokens, two new ones
    (None, None, None)
    >>> print(plan)
    0: 0, 1, 5, 6
    1: 2, 3, 4
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash import kernels
from ringflash.kernels import decode
from ringflash.kernels.checks import like_out
from ringflash.layout import Layout
from ringflash.mask import IntervalMask, Intervals, check_tokens, to_device
from ringflash.partial import Partial, merge_sink
from ringflash.ring.transport import Allocate, Message, Ring, Transfer
from ringflash.ring.watchdog import Label

CHUNK = 32768  # tokens per forward of prefill, over all ranks: 131072 take 4.19 s, with 16384 4.88 s (H200)
FEW = 64  # up to this many new tokens, the cache is split among programs; more fill a GPU with query tiles
SPARE = 256  # fewest rows of a windowed layer beyond its window: rows are moved only once per as many tokens


@dataclass(frozen=True, eq=False)
class RankStep:
    """What one rank does with new tokens, in every layer of a kind.

    First, unless `kept` is None, the rows `kept` move to the front. Then `own`, the rank's part of the new tokens, is
    written from row `at` on; `rows` are then in use. seen: the rows that queries see; in prefill, for the queries of
    each rank.
    """

    kept: slice | None
    own: slice
    at: int
    rows: int
    seen: tuple[Intervals, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """The steps of the local ranks for queries begin:end of a forward. sharded: each rank has its own queries."""

    begin: int
    end: int
    sharded: bool
    ranks: tuple[RankStep, ...]


def rows_for(capacity: int, chunk: int, ranks: int, left: int | None) -> int:
    """Rows of a layer on each of `ranks` ranks: its share of the capacity, or its window and a chunk."""
    # If the last chunk does not divide among the ranks, some get two rows more than others.
    share = -(-capacity // ranks) + (2 if ranks > 1 else 0)
    return share if left is None else min(share, left + max(chunk, SPARE))


class CachePlan:
    """Which rank holds which tokens of a cache in which rows, and what new tokens do. It is the same on every rank.

    capacity: largest number of tokens, over all ranks. chunk: largest number of new tokens at once, over all ranks;
    longer prompts are divided. windows: the windows of the layers, as keys to the left, or None for no window. Raises
    ValueError or TypeError for invalid numbers.
    """

    def __init__(self, ring: Ring, capacity: int, chunk: int, windows: Sequence[int | None] = (None,)) -> None:
        self.ring = ring
        self.capacity = check_tokens("capacity", capacity, least=1)
        self.chunk = check_tokens("chunk", chunk, least=1)
        self.windows = tuple(dict.fromkeys(windows))
        self._rows = {left: _Rows(ring, rows_for(capacity, chunk, ring.size, left), left) for left in self.windows}
        self.length = 0
        self._held = [0] * ring.size  # tokens of each rank, in layers without windows
        self._forward: list[_Tokens] = []
        self._steps: dict[int | None, tuple[Step, ...]] = {}

    def rows(self, left: int | None) -> int:
        """Rows that a layer with this window has on each rank."""
        return self._rows[left].capacity

    def begin(self, tokens: int, layout: Layout | None = None) -> None:
        """Begin a forward of new tokens, which the ranks share by `layout`, or which every rank computes (None).

        Raises ValueError if the cache cannot hold them.
        """
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"a cache of capacity={self.capacity} tokens holds {self.length}, and cannot hold {tokens} more: make "
                f"it with capacity={self.length + tokens} or more"
            )
        self._forward = [self._shared(tokens, layout)] if layout is not None else self._computed_everywhere(tokens)
        self._steps = {}
        for left in self.windows:
            self._steps[left] = tuple(self._rows[left].step(x) for x in self._forward)
        self.length += tokens
        for piece in self._forward:
            self._held = [held + len(x) for held, x in zip(self._held, piece.stored, strict=True)]

    def steps(self, left: int | None) -> tuple[Step, ...]:
        """The steps of a layer with this window in the forward that has begun."""
        return self._steps[left]

    def _shared(self, tokens: int, layout: Layout) -> _Tokens:
        if layout.length != tokens or layout.ranks != self.ring.size or tokens > self.chunk:
            raise ValueError(
                f"a layout of {layout.length} tokens on {layout.ranks} ranks does not fit {tokens} new tokens on a "
                f"ring of {self.ring.size} and chunk={self.chunk}"
            )
        queries = [layout.positions(rank) + self.length for rank in range(self.ring.size)]
        end = self.length + tokens
        return _Tokens(0, queries, [x[x < end] for x in queries], end, sharded=True)

    def _computed_everywhere(self, tokens: int) -> list[_Tokens]:
        """Pieces of at most `chunk` tokens. Every rank stores a run of each, so that all hold about the same number."""
        pieces, held = [], list(self._held)
        for begin in range(0, tokens, self.chunk):
            positions = torch.arange(self.length + begin, self.length + min(tokens, begin + self.chunk))
            counts = [0] * self.ring.size
            fewest = [(count, rank) for rank, count in enumerate(held)]
            heapq.heapify(fewest)
            for _ in positions:
                count, rank = fewest[0]
                counts[rank] += 1
                heapq.heapreplace(fewest, (count + 1, rank))
            held = [a + b for a, b in zip(held, counts, strict=True)]
            stored = list(positions.split(counts))
            pieces.append(_Tokens(begin, [positions], stored, int(positions[-1]) + 1, sharded=False))
        return pieces

    def snapshot(self) -> CacheState:
        """The state to which `restore` returns. The layers keep their own tensors."""
        rows = {left: ([*x.count], x.positions.clone() if left is not None else None) for left, x in self._rows.items()}
        return CacheState(self.length, tuple(self._held), rows)

    def restore(self, state: CacheState) -> None:
        """Forget all tokens since the snapshot."""
        self.length, self._held = state.length, [*state.held]
        for left, (count, positions) in state.rows.items():
            self._rows[left].count = [*count]
            if positions is not None:
                self._rows[left].positions.copy_(positions)

    def count(self, left: int | None) -> list[int]:
        """Rows in use on each local rank."""
        return [*self._rows[left].count]

    def __str__(self) -> str:
        rows = self._rows[self.windows[0]]
        held = (x[:count].tolist() for x, count in zip(rows.positions, rows.count, strict=True))
        return "\n".join(f"{rank}: {', '.join(map(str, x))}" for rank, x in zip(self.ring.local, held, strict=True))


@dataclass(frozen=True, eq=False)
class CacheState:
    """A CachePlan's state: the number of tokens in all, of each rank, and the rows in use for each window."""

    length: int
    held: tuple[int, ...]
    rows: dict[int | None, tuple[list[int], Tensor | None]]


@dataclass(frozen=True, eq=False)
class _Tokens:
    """New tokens: positions of the queries (of each rank, or those that all compute), and what each rank stores."""

    begin: int  # in the forward
    queries: list[Tensor]
    stored: list[Tensor]
    end: int  # of all tokens; a query at or past it is padding
    sharded: bool


class _Rows:
    """The rows of layers with one window: positions int64 [local ranks, capacity], ascending; count of each in use."""

    def __init__(self, ring: Ring, capacity: int, left: int | None) -> None:
        self.ring, self.capacity, self.left = ring, capacity, left
        self.count = [0] * len(ring.local)

    @functools.cached_property
    def positions(self) -> Tensor:
        """Allocated with the first token, so that even a cache that is too large can report its size."""
        return torch.zeros(len(self.ring.local), self.capacity, dtype=torch.int64)

    def step(self, new: _Tokens) -> Step:
        """The step of new tokens, after which their rows are in use."""
        ranks = tuple(self._rank_step(i, rank, new) for i, rank in enumerate(self.ring.local))
        return Step(new.begin, new.begin + (0 if new.sharded else len(new.queries[0])), new.sharded, ranks)

    def _rank_step(self, i: int, rank: int, new: _Tokens) -> RankStep:
        positions, stored, kept = self.positions[i], new.stored[rank], None
        if self.count[i] + len(stored) > self.capacity and self.left is not None:
            first = min(int(x[0]) for x in new.queries) - self.left
            gone = int(torch.searchsorted(positions[: self.count[i]], first))
            kept = slice(gone, self.count[i])
            self.count[i] -= gone
            positions[: self.count[i]] = positions[kept].clone()
        at, rows = self.count[i], self.count[i] + len(stored)
        if rows > self.capacity:
            raise ValueError(f"rank {rank} holds {at} of {self.capacity} rows, and cannot hold {len(stored)} more")
        positions[at:rows] = stored
        self.count[i] = rows
        # In prefill a rank is given its own tokens, padding last; else all, of which it stores a run.
        skipped = 0 if new.sharded else sum(map(len, new.stored[:rank]))
        seen = tuple(self._seen(queries, positions[:rows], new.end) for queries in new.queries)
        return RankStep(kept, slice(skipped, skipped + len(stored)), at, rows, seen)

    def _seen(self, queries: Tensor, keys: Tensor, end: int) -> Intervals:
        """Each query sees itself, what is before it and in its window; padding sees nothing."""
        valid = queries < end
        lo = torch.zeros_like(queries) if self.left is None else queries - self.left
        bounds = torch.stack([torch.where(valid, lo, end), torch.where(valid, queries + 1, end)])
        start, stop = torch.searchsorted(keys, bounds).unsqueeze(1)
        if len(queries) > FEW:
            return IntervalMask(start, stop, len(keys)).intervals(self.ring.device)
        start, stop = (to_device(x.to(torch.int32), self.ring.device) for x in (start, stop))
        return Intervals(start, stop, start, stop, {}, {})


class LayerCache:
    """One layer's keys and values on the local ranks, reserved once: k [B, rows, Hkv, D] and v [B, rows, Hkv, Dv]."""

    def __init__(self, ranks: int, rows: int, k: Tensor, v: Tensor, batch: int) -> None:
        """ranks: how many are local. k, v [..., Hkv, D]: as new ones are, of which heads and dtype are taken."""
        self.k, self.v = (
            [torch.empty(batch, rows, *x.shape[2:], dtype=x.dtype, device=x.device) for _ in range(ranks)]
            for x in (k, v)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all local ranks."""
        return sum(x.nbytes for x in (*self.k, *self.v))

    def move(self, i: int, step: RankStep) -> None:
        """Move the rows of local rank i that a step keeps to the front, where it says so."""
        if step.kept is not None:
            for held in (self.k[i], self.v[i]):
                held[:, : step.at] = held[:, step.kept].clone()

    def write(self, i: int, step: RankStep, k: Tensor, v: Tensor) -> None:
        """Store what local rank i keeps of new k and v [B, n, Hkv, D]."""
        self.move(i, step)
        for held, new in ((self.k[i], k), (self.v[i], v)):
            held[:, step.at : step.rows] = new[:, step.own]


@dataclass(frozen=True, eq=False)
class DeviceStep:
    """The step of one new token on a ring of one, with its numbers on the device, in tensors that stay.

    What reads them there can be recorded as a CUDA graph and replayed for the next token. row: int64 [1], where its key
    and value go. seen: start and end int32 [1, 1], the rows that it sees.
    """

    row: Tensor
    seen: Intervals

    @classmethod
    def on(cls, device: torch.device) -> DeviceStep:
        """Tensors without a step yet."""
        start, end = torch.zeros(2, 1, 1, dtype=torch.int32, device=device)
        return cls(torch.zeros(1, dtype=torch.int64, device=device), Intervals(start, end, start, end, {}, {}))

    def take(self, step: Step) -> None:
        """Take over a step's numbers. The host does not wait."""
        self.row.fill_(step.ranks[0].at)
        self.seen.start.copy_(step.ranks[0].seen[0].start)
        self.seen.end.copy_(step.ranks[0].seen[0].end)


@dataclass(frozen=True, eq=False)
class Attention:
    """How a layer attends to its cache. kernel: a name, as in `ring_attention`; name: of the layer, for reports."""

    ring: Ring
    scale: float
    softcap: float | None = None
    sink: Tensor | None = None
    kernel: str = "auto"
    name: str = "attention"


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, steps: Sequence[Step], attention: Attention
) -> Tensor:
    """Store new keys and values, and attend to all that new queries see, without gradients.

    q [B, n, Hq, D], k [B, n, Hkv, D], v [B, n, Hkv, Dv]: where ranks share the tokens (prefill), local ranks are
    outermost in the batch; else they are the same on all ranks. Returns out [B, n, Hq, Dv] in q's dtype.
    """
    if steps[0].sharded:
        return _prefill(q, k, v, cache, steps[0], attention)
    pieces = [slice(step.begin, step.end) for step in steps]
    found = [_decode(q[:, x], k[:, x], v[:, x], cache, step, attention) for x, step in zip(pieces, steps, strict=True)]
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def attention_on_device(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, step: DeviceStep, attention: Attention
) -> Tensor:
    """`cached_attention` of one new token on a ring of one, where the host knows neither its row nor what it sees.

    Rows that `DeviceStep.take`'s step moves have moved.
    """
    for held, new in ((cache.k[0], k), (cache.v[0], v)):
        held.index_copy_(1, step.row, new)
    whole = RankStep(None, slice(0, 1), 0, cache.k[0].shape[1], (step.seen,))
    return _attend(q, cache, 0, whole, 0, attention, sink=attention.sink, out_dtype=q.dtype).out


def _decode(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, step: Step, attention: Attention) -> Tensor:
    """Queries that every rank has: each attends to its keys, and one exchange gives all parts to all ranks."""
    ring = attention.ring
    for i, rank_step in enumerate(step.ranks):
        cache.write(i, rank_step, k, v)
    if ring.size == 1:
        return _attend(q, cache, 0, step.ranks[0], 0, attention, sink=attention.sink, out_dtype=q.dtype).out
    label = Label(attention.name, "decode")
    with ring.receive_buffers(label) as allocate:
        parts = [_parts(allocate, ring.size, like_out(q, v)) for _ in ring.local]
        for i, rank in enumerate(ring.local):
            found = _attend(q, cache, i, step.ranks[i], 0, attention)
            parts[i].of(rank).out.copy_(found.out)
            parts[i].of(rank).lse.copy_(found.lse)
        own = [[x.flat[rank]] * ring.size for rank, x in zip(ring.local, parts, strict=True)]
        _to_all(ring, own, parts, label).wait()
        return decode.combine(parts[0].all, sink=attention.sink, out_dtype=q.dtype).out


def _prefill(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, step: Step, attention: Attention) -> Tensor:
    """Each rank's own queries: they go to all ranks, and what these find returns."""
    ring, label = attention.ring, Label(attention.name, "prefill")
    by_rank = list(zip(*(x.chunk(len(ring.local)) for x in (q, k, v)), strict=True))
    for i, rank_step in enumerate(step.ranks):
        cache.write(i, rank_step, *by_rank[i][1:])
    if ring.size == 1:
        return _attend(q, cache, 0, step.ranks[0], 0, attention, sink=attention.sink, out_dtype=q.dtype).out
    with ring.receive_buffers(label) as allocate:
        shape = by_rank[0][0].shape
        queries = [_Buffer(allocate((ring.size, *shape), q.dtype)) for _ in ring.local]
        found = [_parts(allocate, ring.size, like_out(by_rank[0][0], v)) for _ in ring.local]
        returned = []
        for i, rank in enumerate(ring.local):
            queries[i].flat[rank].copy_(by_rank[i][0])
            returned.append(
                [found[i].flat[rank] if r == rank else torch.empty_like(x) for r, x in enumerate(found[i].flat)]
            )

        def attend(i: int, source: int) -> None:
            part = _attend(queries[i].flat[source], cache, i, step.ranks[i], source, attention)
            torch.cat([part.out.flatten(), part.lse.flatten()], out=returned[i][source])

        own = [[x.flat[rank]] * ring.size for rank, x in zip(ring.local, queries, strict=True)]
        travelling = _to_all(ring, own, queries, label.at("queries"))
        for i, rank in enumerate(ring.local):  # while the others' are on their way
            attend(i, rank)
        travelling.wait()
        for i, rank in enumerate(ring.local):
            for source in range(ring.size):
                if source != rank:
                    attend(i, source)
        _to_all(ring, returned, found, label.at("results")).wait()
        out = [decode.combine(x.all, sink=attention.sink, out_dtype=q.dtype).out for x in found]
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
    """Queries of rank `source` over the keys of local rank i."""
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


class _Buffer:
    """What has arrived, by source: flat [ranks, ...]."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat


class _Parts(_Buffer):
    """Partials of the queries like `like` [B, n, Hq, Dv], by the rank that found them: out and lse in one message."""

    def __init__(self, flat: Tensor, like: Tensor) -> None:
        super().__init__(flat)
        batch, tokens, heads, _ = like.shape
        count = like.numel()
        lse = flat[:, count:].view(-1, batch, heads, tokens)
        self.all = Partial(flat[:, :count].view(-1, *like.shape), lse)

    def of(self, rank: int) -> Partial:
        """Those that a rank found, as views."""
        return Partial(self.all.out[rank], self.all.lse[rank])


def _parts(allocate: Allocate, ranks: int, like: Tensor) -> _Parts:
    batch, tokens, heads, dim = like.shape
    return _Parts(allocate((ranks, batch * tokens * heads * (dim + 1)), torch.float32), like)


def _to_all(ring: Ring, sent: list[list[Tensor]], received: Sequence[_Buffer], label: Label) -> Transfer:
    """Start to send sent[i][r] from local rank i to rank r, where it arrives as flat[i's rank]; not to itself."""
    outgoing, incoming = [], []
    for rank, messages, buffer in zip(ring.local, sent, received, strict=True):
        for other in range(ring.size):
            if other != rank:
                outgoing.append(Message(rank, other, messages[other], target=buffer.flat[rank]))
                incoming.append(Message(other, rank, buffer.flat[other]))
    return ring.exchange(outgoing, incoming, label)
