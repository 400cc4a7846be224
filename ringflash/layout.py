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
        """Chunks dealt out so that all ranks have the same number of tokens and nearly the same (query, key) pairs.

        Zigzag, where no rank has more than `tolerance` above the mean under it; else the coarsest chunks that reach
        that, or the best that chunks of 128 tokens or more give. In rounds, each rank gets one chunk: the most work to
        whom has least so far. Then chunks are swapped between the busiest rank and others while that helps.
        Dealing spreads a document over all ranks, which balances each hop as well: a ring goes hop by hop, gradients
        from rank to rank, so that work kept inside one rank has the others wait for it.
        """
        layout = best = cls.zigzag(mask.queries, ranks, parts)
        per_rank = 4
        while best.imbalance(mask) > tolerance and layout.chunk >= 128 * parts:
            layout = _dealt(mask, ranks, per_rank, parts)
            best = min(best, layout, key=lambda candidate: candidate.imbalance(mask))
            per_rank *= 2
        return best

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


def _dealt(mask: IntervalMask, ranks: int, per_rank: int, parts: int) -> Layout:
    """Equal numbers of chunks to each rank, balanced by work."""
    chunk = _ceil(mask.queries, ranks * per_rank * parts) * parts
    work = _chunk_work(mask, chunk, ranks * per_rank)
    load = torch.zeros(ranks, dtype=torch.float64)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for cards in work.argsort(descending=True, stable=True).view(per_rank, ranks):
        for card, rank in zip(cards.tolist(), load.argsort(stable=True).tolist(), strict=True):
            hands[rank].append(card)
            load[rank] += work[card]
    chunks = torch.tensor(hands)
    while _swap(chunks, work):
        pass
    return Layout(mask.queries, chunk, chunks.sort(1).values)


def _swap(chunks: Tensor, work: Tensor) -> bool:
    """Exchange one chunk of the busiest rank for another's, in place, so that the busier of the two gets least work.

    Returns whether there was an exchange that helps.
    """
    load = work[chunks].sum(1)
    busiest = int(load.argmax())
    gain = work[chunks[busiest]][:, None, None] - work[chunks][None]  # [its chunks, ranks, their chunks]
    after = torch.maximum(load[busiest] - gain, load[None, :, None] + gain)
    best = int(after.argmin())
    if float(after.flatten()[best]) >= float(load[busiest]) * (1 - 1e-9):
        return False
    mine, rank, theirs = torch.unravel_index(torch.tensor(best), after.shape)
    chunks[busiest, mine], chunks[rank, theirs] = chunks[rank, theirs].clone(), chunks[busiest, mine].clone()
    return True
