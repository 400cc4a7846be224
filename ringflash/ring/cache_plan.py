"""CachePlan: which rank of a ring holds which tokens of a KV cache, in which rows, and what each forward adds.

Planning is pure: it needs no tensor of a model and no process group. `ring.decode` runs the steps planned here. A chunk
of a document is sharded by a layout, as in training. Every rank computes new tokens; they are stored on the rank with
the fewest, so that all ranks hold about the same number. Layers with a sliding window keep only the window: when their
rows are full, rows that no later query sees are dropped.

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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringflash.intervals import Intervals, to_device
from ringflash.layout import Layout
from ringflash.mask import IntervalMask, check_tokens

if TYPE_CHECKING:
    from ringflash.ring.transport import Ring

CHUNK = 32768  # tokens per forward of prefill, over all ranks: 131072 take 4.19 s, with 16384 4.88 s (H200)
FEW = 64  # up to this number of new tokens, the cache is split among programs; more tokens fill a GPU with query tiles
SPARE = 256  # the fewest rows of a windowed layer beyond its window: rows are moved once per this number of tokens


@dataclass(frozen=True, eq=False)
class RankStep:
    """One rank's work on new tokens, the same in every layer with the same window.

    First, unless `kept` is None, the rows `kept` are moved to the front. Then `own`, the rank's part of the new tokens,
    is written from row `at` on, and `rows` rows are in use. seen: the rows that queries see; in prefill, for the
    queries of each rank.
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
    """Rows per layer and rank: the rank's share of the capacity, or the window and a chunk."""
    # If the last chunk does not divide among the ranks, some get two rows more than others.
    share = -(-capacity // ranks) + (2 if ranks > 1 else 0)
    return share if left is None else min(share, left + max(chunk, SPARE))


class CachePlan:
    """Which rank holds which tokens of a cache in which rows, and the steps of new tokens. All ranks plan the same.

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
        self._held = [0] * ring.size  # tokens on each rank, in layers without windows
        self._forward: list[_NewTokens] = []
        self._steps: dict[int | None, tuple[Step, ...]] = {}

    def rows(self, left: int | None) -> int:
        """Rows that a layer with this window has on each rank."""
        return self._rows[left].capacity

    def begin(self, tokens: int, layout: Layout | None = None) -> None:
        """Begin a forward of new tokens, sharded by `layout`; with None, every rank computes all of them.

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

    def _shared(self, tokens: int, layout: Layout) -> _NewTokens:
        if layout.length != tokens or layout.ranks != self.ring.size or tokens > self.chunk:
            raise ValueError(
                f"a layout of {layout.length} tokens on {layout.ranks} ranks does not fit {tokens} new tokens on a "
                f"ring of {self.ring.size} and chunk={self.chunk}"
            )
        queries = [layout.positions(rank) + self.length for rank in range(self.ring.size)]
        end = self.length + tokens
        return _NewTokens(0, queries, [x[x < end] for x in queries], end, sharded=True)

    def _computed_everywhere(self, tokens: int) -> list[_NewTokens]:
        """Pieces of at most `chunk` tokens. Each rank stores a run of each, so that all hold about the same number."""
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
            pieces.append(_NewTokens(begin, [positions], stored, int(positions[-1]) + 1, sharded=False))
        return pieces

    def snapshot(self) -> CacheState:
        """The state for `restore`. Layers handle their own tensors."""
        rows = {left: ([*x.count], x.positions.clone() if left is not None else None) for left, x in self._rows.items()}
        return CacheState(self.length, tuple(self._held), rows)

    def restore(self, state: CacheState) -> None:
        """Drop all tokens since the snapshot."""
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
    """A CachePlan's state: the total number of tokens, that of each rank, and the rows in use for each window."""

    length: int
    held: tuple[int, ...]
    rows: dict[int | None, tuple[list[int], Tensor | None]]


@dataclass(frozen=True, eq=False)
class _NewTokens:
    """New tokens: positions of the queries (per rank, or one list for all ranks), and those that each rank stores."""

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

    def step(self, new: _NewTokens) -> Step:
        """The step of new tokens, after which their rows are in use."""
        ranks = tuple(self._rank_step(i, rank, new) for i, rank in enumerate(self.ring.local))
        return Step(new.begin, new.begin + (0 if new.sharded else len(new.queries[0])), new.sharded, ranks)

    def _rank_step(self, i: int, rank: int, new: _NewTokens) -> RankStep:
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
        # In prefill, a rank is given its own tokens, padding last; otherwise all tokens, of which it stores a run.
        skipped = 0 if new.sharded else sum(map(len, new.stored[:rank]))
        seen = tuple(self._seen(queries, positions[:rows], new.end) for queries in new.queries)
        return RankStep(kept, slice(skipped, skipped + len(stored)), at, rows, seen)

    def _seen(self, queries: Tensor, keys: Tensor, end: int) -> Intervals:
        """Each query sees itself and the keys before it, within its window; padding sees nothing."""
        valid = queries < end
        lo = torch.zeros_like(queries) if self.left is None else queries - self.left
        bounds = torch.stack([torch.where(valid, lo, end), torch.where(valid, queries + 1, end)])
        start, stop = torch.searchsorted(keys, bounds).unsqueeze(1)
        if len(queries) > FEW:
            return IntervalMask(start, stop, len(keys)).intervals(self.ring.device)
        start, stop = (to_device(x.to(torch.int32), self.ring.device) for x in (start, stop))
        return Intervals.of_queries(start, stop)
