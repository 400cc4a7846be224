"""Layout: which rank holds which tokens.

The sequence is cut into chunks of equal length, and every rank holds the same number of chunks, in ascending order.
Eight chunks on four ranks, each rank's tokens marked along the sequence:

    >>> print(Layout.contiguous(8, ranks=4))
    0: ##......
    1: ..##....
    2: ....##..
    3: ......##
    >>> print(Layout.zigzag(8, ranks=4))
    0: #......#
    1: .#....#.
    2: ..#..#..
    3: ...##...
    >>> print(Layout.striped(8, ranks=4))
    0: #...#...
    1: .#...#..
    2: ..#...#.
    3: ...#...#

Under a causal mask a contiguous layout leaves the last rank most of the work; zigzag (an early chunk and the late one
that mirrors it) and striped (every ranks-th token) give all ranks the same. Because shards are ascending, an
`IntervalMask` restricted to any two of them is an IntervalMask again.

A length that does not divide is padded at the sequence's end, with positions at or past `length`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.mask import IntervalMask

# Zigzag gives way to a layout that leaves less than this part of its pairs between ranks.
_WORTH = 0.9
# More take seconds: swaps look at all pairs of chunks.
_MOST_CHUNKS = 1024
# What two chunks of different ranks that see each other cost besides their pairs, in a rank's mean pairs. On packed
# documents 0.01 has fewer hops with work than 0, and 0.1 often does not balance.
_CHARGE = 0.01
# Of balance against pairs between ranks. Past the low weight, one that balances no better ends the search.
_FIRST_WEIGHT, _LOW_WEIGHT = 0.1, 300.0


@dataclass(frozen=True, eq=False)
class Layout:
    """Which chunks of the sequence each rank holds.

    Fields: length, the sequence's tokens without padding; chunk, tokens in a chunk; chunks int64 [ranks, n] on the
    CPU, the chunks of each rank, ascending. Raises ValueError unless every chunk has exactly one owner and all of
    `length` is covered.
    """

    length: int
    chunk: int
    chunks: Tensor

    def __post_init__(self) -> None:
        owned = self.chunks.flatten().sort().values
        if not torch.equal(owned, torch.arange(self.chunks.numel())):
            raise ValueError("every chunk must have exactly one owner")
        if bool((self.chunks.diff(dim=1) <= 0).any()):
            raise ValueError("a rank's chunks must be in ascending order")
        if self.padded_length < self.length:
            raise ValueError(f"{owned.numel()} chunks of {self.chunk} tokens do not hold {self.length} tokens")

    @classmethod
    def contiguous(cls, length: int, ranks: int, parts: int = 1) -> Layout:
        """Rank r holds the r-th of `ranks` runs. parts, in all layouts: a rank's tokens shall divide into as many."""
        return cls(length, _ceil(length, ranks * parts) * parts, torch.arange(ranks)[:, None])

    @classmethod
    def zigzag(cls, length: int, ranks: int, parts: int = 1) -> Layout:
        """Rank r holds the r-th of 2 * ranks runs and the r-th from the end: balanced under a causal mask."""
        first = torch.arange(ranks)
        chunk = _ceil(length, 2 * ranks * parts) * parts
        return cls(length, chunk, torch.stack([first, 2 * ranks - 1 - first], dim=1))

    @classmethod
    def striped(cls, length: int, ranks: int, parts: int = 1) -> Layout:
        """Rank r holds tokens r, r + ranks, r + 2 ranks, ...: balanced under a causal mask and narrow windows."""
        held = _ceil(length, ranks * parts) * parts
        return cls(length, 1, torch.arange(held * ranks).view(-1, ranks).T.contiguous())

    @classmethod
    def balanced(cls, mask: IntervalMask, ranks: int, parts: int = 1, tolerance: float = 0.03) -> Layout:
        """Equal tokens for all ranks, nearly equal (query, key) pairs, and as many of those as can be inside one rank.

        Contiguous runs, where no rank has more than `tolerance` above the mean under them; else their coarsest chunks
        that swaps between ranks bring within it, or the best that up to 1024 chunks of 128 tokens or more give.
        Zigzag, whose runs are longer, where it balances as well and hardly more pairs lie between ranks.
        """
        best, zigzag = cls.contiguous(mask.queries, ranks, parts), cls.zigzag(mask.queries, ranks, parts)
        per_rank, most = 8, min(_MOST_CHUNKS, mask.queries // (128 * parts)) // ranks
        while best.imbalance(mask) > tolerance and per_rank <= most:
            layout = _swapped(mask, ranks, per_rank, parts, tolerance)
            best = min(best, layout, key=lambda candidate: candidate.imbalance(mask))
            per_rank *= 2
        if zigzag.imbalance(mask) > tolerance:
            return min(best, zigzag, key=lambda candidate: candidate.imbalance(mask))
        unbalanced = best.imbalance(mask) > tolerance
        return zigzag if unbalanced or _WORTH * zigzag._apart(mask) <= best._apart(mask) else best

    @classmethod
    def named(cls, name: str, length: int, ranks: int, parts: int = 1) -> Layout:
        """The layout called "contiguous", "zigzag" or "striped". Raises ValueError for another name."""
        if name not in LAYOUTS:
            raise ValueError(f"layout={name} is not one of {', '.join(LAYOUTS)}")
        return LAYOUTS[name](length, ranks, parts)

    def split(self, parts: int) -> Layout:
        """The layout of ranks * parts ranks in which each rank's tokens, in order, are divided among `parts`.

        Raises ValueError where they do not divide.
        """
        if self.shard_length % parts:
            raise ValueError(f"{self.shard_length} tokens of a rank do not divide into {parts} parts")
        chunk = math.gcd(self.chunk, self.shard_length // parts)
        finer = self.chunks[:, :, None] * (self.chunk // chunk) + torch.arange(self.chunk // chunk)
        return Layout(self.length, chunk, finer.reshape(self.ranks * parts, -1))

    @property
    def ranks(self) -> int:
        return len(self.chunks)

    @property
    def shard_length(self) -> int:
        return self.chunks.shape[1] * self.chunk

    @property
    def padded_length(self) -> int:
        return self.chunks.numel() * self.chunk

    def imbalance(self, mask: IntervalMask) -> float:
        """How much more (query, key) pairs the busiest rank has than the mean: 0.03 for 3 percent."""
        work = _chunk_work(mask, self.chunk, self.chunks.numel())[self.chunks].sum(1)
        return float(work.max() / work.mean().clamp(min=1e-9)) - 1

    def pairs(self, mask: IntervalMask) -> Tensor:
        """(query, key) pairs of each rank's queries with each rank's keys, over all batch rows: int64 [ranks, ranks].

        A rank's keys below a bound are those of its chunks before the bound's chunk, and some of that chunk's own.
        """
        ranks, count, chunk = self.ranks, self.chunks.numel(), self.chunk
        owner = torch.empty(count, dtype=torch.int64)
        owner[self.chunks] = torch.arange(ranks)[:, None].expand_as(self.chunks)
        owned = torch.nn.functional.one_hot(owner, ranks).double()  # [chunks, ranks]
        before = owned.cumsum(0) - owned  # chunks of each rank before a chunk
        holder = owner[torch.arange(mask.queries) // chunk]

        def keys_below(bound: Tensor) -> Tensor:
            """Summed over each rank's queries: keys of each source below the bound, [ranks, ranks]."""
            at = (bound // chunk).clamp(max=count - 1)  # a bound at the very end lies a whole chunk into the last one
            cell, offset = (holder * count + at).flatten(), (bound - at * chunk).flatten()
            number = torch.bincount(cell, minlength=ranks * count).view(ranks, count)
            offsets = torch.bincount(cell, offset.double(), minlength=ranks * count).view(ranks, count)
            return number.double() @ before * chunk + offsets @ owned  # whole numbers, exact below 2 ** 53

        return (keys_below(mask.hi) - keys_below(mask.lo)).long()

    def _apart(self, mask: IntervalMask) -> float:
        """The share of (query, key) pairs whose query and key are on different ranks."""
        pairs = self.pairs(mask)
        return 1 - float(pairs.diagonal().sum()) / max(1, mask.area())

    def positions(self, rank: int) -> Tensor:
        """The global positions that a rank holds, ascending, int64 [shard_length]; at or past `length`: padding."""
        return (self.chunks[rank][:, None] * self.chunk + torch.arange(self.chunk)).flatten()

    def shard(self, x: Tensor, rank: int, dim: int = 1, padding: float = 0) -> Tensor:
        """A rank's part of x, whose `dim` is the whole sequence; positions past its end hold `padding`."""
        if x.shape[dim] != self.length:
            raise ValueError(f"dimension {dim} must hold the sequence's {self.length} tokens, got {[*x.shape]}")
        positions = self.positions(rank).to(x.device)
        shard = x.index_select(dim, positions.clamp(max=self.length - 1))
        past_end = (positions >= self.length).view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))
        return shard.masked_fill(past_end, padding)

    def unshard(self, shards: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole sequence from all ranks' shards, in rank order, without the padding: the inverse of shard."""
        if len(shards) != self.ranks:
            raise ValueError(f"{self.ranks} ranks have {self.ranks} shards, got {len(shards)}")
        positions = torch.cat([self.positions(rank) for rank in range(self.ranks)])
        order = positions.argsort()[: self.length].to(shards[0].device)
        return torch.cat(tuple(shards), dim).index_select(dim, order)

    def __str__(self) -> str:
        rows = []
        for rank in range(self.ranks):
            held = set(self.positions(rank).tolist())
            rows.append(f"{rank}: " + "".join("#" if token in held else "." for token in range(self.length)))
        return "\n".join(rows)


LAYOUTS: dict[str, Callable[[int, int, int], Layout]] = {
    "contiguous": Layout.contiguous,
    "zigzag": Layout.zigzag,
    "striped": Layout.striped,
}


def _ceil(a: int, b: int) -> int:
    if b < 1:
        raise ValueError(f"ranks and parts must be 1 or more, got a product of {b}")
    return -(-a // b)


def _chunk_work(mask: IntervalMask, chunk: int, count: int) -> Tensor:
    """(query, key) pairs of the queries in each chunk, over all batch rows: float64 [count]."""
    pairs = (mask.hi - mask.lo).sum(0).double()
    return torch.nn.functional.pad(pairs, (0, chunk * count - len(pairs))).view(count, chunk).sum(1)


def _swapped(mask: IntervalMask, ranks: int, per_rank: int, parts: int, tolerance: float) -> Layout:
    """Contiguous runs of per_rank chunks each, after swaps of chunks between ranks.

    Balance weighs little at first and more until it is within `tolerance`, so that it costs as little as it can.
    """
    chunk = _ceil(mask.queries, ranks * per_rank * parts) * parts
    every_chunk = Layout(mask.queries, chunk, torch.arange(ranks * per_rank)[:, None])
    swaps = _Swaps(every_chunk.pairs(mask).double(), torch.arange(ranks).repeat_interleave(per_rank), ranks)
    before, weight = math.inf, _FIRST_WEIGHT
    while swaps.imbalance() > tolerance and (weight <= _LOW_WEIGHT or swaps.imbalance() < before):
        before = swaps.imbalance()
        swaps.descend(weight)
        weight *= 1.5
    return Layout(mask.queries, chunk, swaps.owner.argsort(stable=True).view(ranks, per_rank))


class _Swaps:
    """Chunks and the ranks that own them, improved by swapping two chunks of different ranks while that helps.

    What is lowered, in pairs, with `mean` the pairs of a rank if all had the same:

        pairs between ranks + charge x chunk pairs between ranks + weight / mean x sum over ranks of (pairs - mean)^2

    The charge is for rectangles that show next to nothing and yet are hops to compute. Sums are of whole numbers, so
    exact in any order: every rank of a ring, whatever its CPU and threads, does the same swaps.
    """

    def __init__(self, pairs: Tensor, owner: Tensor, ranks: int) -> None:
        """pairs: float64 [chunks, chunks], of one's queries with the other's keys; owner: int64 [chunks]."""
        self.owner, self.work = owner, pairs.sum(1)
        self.load = torch.zeros(ranks, dtype=torch.float64).index_add_(0, owner, self.work)
        self.mean = float(self.load.mean())
        between = pairs + pairs.T
        self.between = (between + (between > 0) * float(int(_CHARGE * self.mean))).fill_diagonal_(0)
        # Between each chunk and all of each rank's chunks.
        self.to_rank = self.between @ torch.nn.functional.one_hot(owner, ranks).double()

    def imbalance(self) -> float:
        return float(self.load.max()) / self.mean - 1

    def descend(self, weight: float) -> None:
        """The swap that helps most, again and again until none helps."""
        change = self._change(torch.arange(len(self.owner)), weight)
        while True:
            a, b = divmod(int(change.argmin()), len(self.owner))
            if float(change[a, b]) > -1e-6 * self.mean:
                return
            ranks = self.owner[[a, b]]
            self._swap(a, b)
            changed = torch.isin(self.owner, ranks).nonzero().flatten()
            change[changed] = self._change(changed, weight)
            change[:, changed] = change[changed].T

    def _swap(self, a: int, b: int) -> None:
        ranks = self.owner[[a, b]]
        gain = self.work[b] - self.work[a]
        self.load[ranks] += torch.stack([gain, -gain])
        moved = self.between[:, b] - self.between[:, a]
        self.to_rank[:, ranks] += torch.stack([moved, -moved], dim=1)
        self.owner[[a, b]] = ranks.flip(0)

    def _change(self, rows: Tensor, weight: float) -> Tensor:
        """What swapping each chunk of `rows` with every chunk would add to what is lowered: [rows, chunks]."""
        mine, theirs = self.owner[rows], self.owner
        inside = self.to_rank.gather(1, self.owner[:, None])  # between a chunk and the rest of its rank
        parted = inside[rows] - self.to_rank[rows][:, theirs] + inside.T - self.to_rank[:, mine].T
        parted += 2 * self.between[rows]  # these two stay apart
        gain = self.work - self.work[rows, None]
        squares = 2 * gain * (self.load[mine, None] - self.load[theirs] + gain)
        return (parted + squares * (weight / self.mean)).masked_fill_(mine[:, None] == theirs, 0)
