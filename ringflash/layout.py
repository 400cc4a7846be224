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

Under a causal mask, a contiguous layout gives the last rank most of the work. Zigzag (an early chunk and the late chunk
that mirrors it) and striped (every ranks-th token) give all ranks the same work. Because the tokens of a shard are in
ascending order, an `IntervalMask` restricted to any two shards is an IntervalMask again.

If a length does not divide, the end of the sequence is padded, with positions at or past `length`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from ringflash.intervals import on_cpu
from ringflash.load_balance import Visits, assign, assign_long, by_hop, duration
from ringflash.mask import IntervalMask, check_mask, check_positions, check_tokens

# Rows of a kernel's query tile: shorter chunks would split tiles.
_TILE = 128
# Imbalances at which zigzag is good enough: of the ranks' pairs over all hops, and on each hop.
_IMBALANCE, _PER_HOP_IMBALANCE = 0.03, 0.12
# Chunks per rank of a balanced layout. With 32, ranks wait less, but visits of more tiles take longer than that saves.
_BALANCED = 16
# Longest short document of a balanced layout, as a fraction of a rank's tokens.
_SHORT = 0.3
# Chunks per rank of a document_local layout, where documents begin and end inside chunks.
_DOCUMENT_LOCAL = 32
# Largest number of chunks to assign: the time grows with its square, to seconds for these.
_CHUNKS = 4096
# (query, key) pairs that are computed while one token's keys, values and their gradients are sent: 32 query and 8 KV
# heads of 128 at 500 TFLOP/s, over a link of 400 GB/s (14 x 32 x 128 operations per pair,
# 16 x 8 x 128 bytes per token).
_PAIRS_PER_TOKEN_SENT = 360


@dataclass(frozen=True, eq=False)
class Layout:
    """Which chunks of the sequence each rank holds.

    Fields: length, the tokens of the sequence without padding; chunk, the tokens of a chunk; chunks int64 [ranks, n] on
    the CPU, the chunks of each rank in ascending order. Raises ValueError unless every chunk has exactly one owner and
    the chunks cover all of `length`, and TypeError for other types.
    """

    length: int
    chunk: int
    chunks: Tensor

    @on_cpu
    def __post_init__(self) -> None:
        check_tokens("length", self.length, least=1)
        check_tokens("chunk", self.chunk, least=1)
        check_positions("chunks", self.chunks)
        if self.chunks.dim() != 2 or not self.chunks.numel():
            raise ValueError(f"chunks must be [ranks, chunks of a rank], got {[*self.chunks.shape]}")
        owned = self.chunks.flatten().sort().values
        if not torch.equal(owned, torch.arange(self.chunks.numel())):
            raise ValueError("every chunk must have exactly one owner")
        if bool((self.chunks.diff(dim=1) <= 0).any()):
            raise ValueError("a rank's chunks must be in ascending order")
        if self.padded_length < self.length:
            raise ValueError(f"{owned.numel()} chunks of {self.chunk} tokens do not hold {self.length} tokens")

    @classmethod
    @on_cpu
    def contiguous(cls, length: int, ranks: int, ulysses: int = 1) -> Layout:
        """Rank r holds the r-th of `ranks` runs. ulysses, here and below: the ranks that share each shard."""
        return cls(length, _ceil(length, ranks * ulysses) * ulysses, torch.arange(ranks)[:, None])

    @classmethod
    @on_cpu
    def zigzag(cls, length: int, ranks: int, ulysses: int = 1) -> Layout:
        """Rank r holds the r-th of 2 * ranks runs and the r-th from the end: balanced under a causal mask."""
        first = torch.arange(ranks)
        chunk = _ceil(length, 2 * ranks * ulysses) * ulysses
        return cls(length, chunk, torch.stack([first, 2 * ranks - 1 - first], dim=1))

    @classmethod
    @on_cpu
    def striped(cls, length: int, ranks: int, ulysses: int = 1) -> Layout:
        """Rank r holds tokens r, r + ranks, r + 2 ranks, ...: balanced under a causal mask and narrow windows."""
        held = _ceil(length, ranks * ulysses) * ulysses
        return cls(length, 1, torch.arange(held * ranks).view(-1, ranks).T.contiguous())

    @classmethod
    @on_cpu
    def balanced(cls, mask: IntervalMask, ranks: int, ulysses: int = 1) -> Layout:
        """Chunks assigned so that all ranks have the same number of tokens and nearly the same work on every hop.

        This is zigzag if its `imbalance` is at most 0.03 and its `per_hop_imbalance` at most 0.12, or if ranks finish
        no earlier with chunks assigned by `load_balance`, 16 per rank, or fewer so that each has 128 tokens.

        If documents are far shorter than a shard, so that sending keys over NVLink would take longer than balance
        saves, the layout is contiguous. For slower links, use layout=auto of ring_inputs or of the trainer.
        """
        check_mask(mask)
        best = cls.zigzag(mask.queries, ranks, ulysses)
        if best.imbalance(mask) > _IMBALANCE or best.per_hop_imbalance(mask) > _PER_HOP_IMBALANCE:
            assigned = _assigned(mask, ranks, ulysses, _BALANCED, _SHORT, assign)
            best = min(best, assigned, key=lambda layout: duration(layout.work(mask)))
        contiguous = cls.contiguous(mask.queries, ranks, ulysses)
        return contiguous if contiguous._with_transfers(mask) <= best._with_transfers(mask) * (1 + _IMBALANCE) else best

    @classmethod
    @on_cpu
    def document_local(cls, mask: IntervalMask, ranks: int, ulysses: int = 1, longest: float = 0.5) -> Layout:
        """Chunks of long documents assigned for nearly the same work on all ranks; short documents stay in runs.

        A document is long if it has more than the fraction `longest` of a rank's tokens. Compared with a balanced
        layout, less is sent and ranks wait longer for each other, which pays off on slow links.
        """
        check_mask(mask)
        return _assigned(mask, ranks, ulysses, _DOCUMENT_LOCAL, longest, assign_long)

    @classmethod
    def named(cls, name: str, length: int, ranks: int, ulysses: int = 1) -> Layout:
        """The layout called "contiguous", "zigzag" or "striped". Raises ValueError for another name."""
        if name not in LAYOUTS:
            raise ValueError(f"layout={name} is not one of {', '.join(LAYOUTS)}")
        return LAYOUTS[name](length, ranks, ulysses)

    @classmethod
    def of(cls, name: str, mask: IntervalMask, ranks: int, ulysses: int = 1) -> Layout:
        """The layout of any name in LAYOUT_NAMES, for a mask. Raises ValueError for another name."""
        if name not in LAYOUT_NAMES:
            raise ValueError(f"layout={name} is not one of {', '.join(LAYOUT_NAMES)}")
        return FITTED[name](mask, ranks, ulysses) if name in FITTED else cls.named(name, mask.queries, ranks, ulysses)

    @on_cpu
    def split(self, ulysses: int) -> Layout:
        """The layout over ranks * ulysses ranks in which `ulysses` consecutive ranks divide each shard in order.

        Raises ValueError if they do not divide it evenly.
        """
        if self.shard_length % ulysses:
            raise ValueError(f"{self.shard_length} tokens of a rank do not divide among ulysses={ulysses} ranks")
        chunk = math.gcd(self.chunk, self.shard_length // ulysses)
        finer = self.chunks[:, :, None] * (self.chunk // chunk) + torch.arange(self.chunk // chunk)
        return Layout(self.length, chunk, finer.reshape(self.ranks * ulysses, -1))

    @property
    def ranks(self) -> int:
        return len(self.chunks)

    @property
    def shard_length(self) -> int:
        return self.chunks.shape[1] * self.chunk

    @property
    def padded_length(self) -> int:
        return self.chunks.numel() * self.chunk

    @functools.cached_property
    def _owner(self) -> Tensor:
        """The rank that holds each chunk, int64 [chunks]."""
        return self.chunks.flatten().argsort() // self.chunks.shape[1]

    @functools.cached_property
    def _following(self) -> Tensor:
        """The first chunk at or after each chunk that a rank holds, int64 [ranks, chunks + 1]; if none, `chunks`."""
        chunks = self.chunks.numel()
        held = torch.full((self.ranks, chunks + 1), chunks)
        held[self._owner, torch.arange(chunks)] = torch.arange(chunks)
        return held.flip(1).cummin(1).values.flip(1)

    def _holds(self, begin: Tensor, end: Tensor) -> Tensor:
        """Whether each rank holds any of the positions begin..end - 1, [ranks, ...], counted in whole chunks."""
        return (begin < end) & (self._following[:, begin // self.chunk] * self.chunk < end)

    @on_cpu
    def pairs(self, mask: IntervalMask) -> Tensor:
        """(query, key) pairs of each rank's queries with each rank's keys, over all batch rows: int64 [ranks, ranks].

        Bounds never decrease, so the queries divide into runs within one chunk whose bounds are within one chunk. The
        keys below such a bound are all chunks before that chunk, and a part of it.
        """
        ranks, count, chunk, owner = self.ranks, self.chunks.numel(), self.chunk, self._owner
        edges = (torch.arange(count + 1) * chunk).expand(mask.batch, -1).contiguous()

        def keys_below(bound: Tensor) -> Tensor:
            """Summed over each rank's queries: keys of each chunk below the bound, [ranks, chunks]."""
            crossed = torch.searchsorted(bound.contiguous(), edges[:, 1:-1].contiguous())
            cuts = torch.cat([edges.clamp(max=mask.queries), crossed], dim=1).sort(1).values
            queries, first = cuts.diff(dim=1), cuts[:, :-1].clamp(max=mask.queries - 1)
            at = (bound.gather(1, first) // chunk).clamp(max=count - 1)
            bounds = torch.nn.functional.pad(bound.cumsum(1), (1, 0)).gather(1, cuts).diff(dim=1)
            cell = (owner[first // chunk] * count + at).flatten()
            inside, later = torch.zeros(2, ranks * count, dtype=torch.int64)
            inside.index_add_(0, cell, (bounds - queries * at * chunk).flatten())
            later.index_add_(0, cell, (queries * chunk).flatten())
            whole = later.view(ranks, count)
            return inside.view(ranks, count) + whole.sum(1, keepdim=True) - whole.cumsum(1)

        by_chunk = keys_below(mask.hi) - keys_below(mask.lo)
        return torch.zeros(ranks, ranks, dtype=torch.int64).index_add_(1, owner, by_chunk)

    @on_cpu
    def work(self, mask: IntervalMask) -> np.ndarray:
        """Pairs of each rank's queries with each rank's keys, and visits of tiles, in pairs: float64 [ranks, ranks].

        See `load_balance`. Tiles begin at every 128th token of a shard and may have tokens of several chunks.
        """
        at = torch.arange(0, self.shard_length, _TILE)
        ends = torch.stack([at, (at + _TILE).clamp(max=self.shard_length) - 1])
        first, last = (self.chunks[:, ends // self.chunk] * self.chunk + ends % self.chunk).unbind(1)  # [ranks, tiles]
        last = last.clamp(max=mask.queries - 1)
        present = first < mask.queries
        first = first.clamp(max=mask.queries - 1)
        of_queries, of_keys = (  # [other rank, rank]
            (self._holds(*seen(first, last)) & present).sum((1, 3)) for seen in (mask.keys_of, mask.queries_of)
        )
        return (self.pairs(mask) + _TILE**2 * (of_queries.T + of_keys)).double().numpy()

    def imbalance(self, mask: IntervalMask) -> float:
        """(query, key) pairs of the busiest rank, relative to the mean over ranks, minus 1: 0.03 for 3 percent."""
        work = self.pairs(mask).sum(1).double()
        return float(work.max() / work.mean().clamp(min=1e-9)) - 1

    def per_hop_imbalance(self, mask: IntervalMask) -> float:
        """Pairs of each hop's busiest rank, summed over hops, relative to the mean over ranks, minus 1.

        With 0.12, ranks that wait for each other on every hop take 12 percent longer than perfectly balanced ranks.
        """
        work = by_hop(self.pairs(mask).numpy())
        return float(work.max(1).sum() / max(work.sum(0).mean(), 1e-9)) - 1

    @on_cpu
    def received(self, mask: IntervalMask) -> Tensor:
        """Tokens whose keys each rank receives for each hop, counted in whole tiles: int64 [hops, ranks].

        Keys are passed on from rank to rank, up to the last rank that sees them.
        """
        ranks, chunks = self.ranks, self.chunks.numel()
        of_chunk, first, last = _tiles(self.chunk, chunks, mask.queries)
        holder = self._owner[of_chunk]
        sees = self._holds(*mask.queries_of(first, last))  # [ranks, B, tiles]
        distance = (torch.arange(ranks)[:, None, None] - holder) % ranks
        farthest = (distance * sees).amax((0, 1))
        tokens = torch.zeros(ranks, ranks, dtype=torch.int64)  # of each owner, by the distance they travel
        tokens.index_put_((holder, farthest), last - first + 1, accumulate=True)
        travelling = tokens.flip(1).cumsum(1).flip(1)  # so far or farther
        travelling[:, 0] = 0
        rank, hop = torch.arange(ranks), torch.arange(ranks)[:, None]
        return travelling[(rank - hop) % ranks, hop]

    def _with_transfers(self, mask: IntervalMask) -> int:
        """Time of all hops, in pairs: each takes as long as its busiest rank or its longest transfer."""
        computing = torch.from_numpy(by_hop(self.pairs(mask).numpy()).max(1))
        sending = self.received(mask).amax(1).roll(-1) * _PAIRS_PER_TOKEN_SENT
        return int(torch.maximum(computing, sending * mask.batch).sum())

    @on_cpu
    def positions(self, rank: int) -> Tensor:
        """The global positions that a rank holds, ascending, int64 [shard_length]; at or past `length`: padding."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"a layout for {self.ranks} ranks has ranks 0 to {self.ranks - 1}, got rank={rank}")
        return (self.chunks[rank][:, None] * self.chunk + torch.arange(self.chunk)).flatten()

    def shard(self, x: Tensor, rank: int, dim: int = 1, padding: float = 0) -> Tensor:
        """A rank's shard of x, whose dimension `dim` is the whole sequence; positions past its end get `padding`."""
        if x.shape[dim] != self.length:
            raise ValueError(f"dimension {dim} must hold the sequence's {self.length} tokens, got {[*x.shape]}")
        positions = self.positions(rank).to(x.device)
        shard = x.index_select(dim, positions.clamp(max=self.length - 1))
        past_end = (positions >= self.length).view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))
        return shard.masked_fill(past_end, padding)

    def unshard(self, shards: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole sequence from all ranks' shards in rank order, without padding: the inverse of shard."""
        if len(shards) != self.ranks:
            raise ValueError(f"{self.ranks} ranks have {self.ranks} shards, got {len(shards)}")
        if {shard.shape[dim] for shard in shards} != {self.shard_length}:
            shapes = ", ".join(str([*shard.shape]) for shard in shards)
            raise ValueError(f"dimension {dim} must hold the {self.shard_length} tokens of a shard, got {shapes}")
        positions = torch.cat([self.positions(rank) for rank in range(self.ranks)])
        order = positions.argsort()[: self.length].to(shards[0].device)
        return torch.cat(tuple(shards), dim).index_select(dim, order)

    def __repr__(self) -> str:
        return f"Layout({self.length} tokens, {self.ranks} ranks, chunks of {self.chunk})"

    def __str__(self) -> str:
        rows = []
        for rank in range(self.ranks):
            held = set(self.positions(rank).tolist())
            rows.append(f"{rank}: " + "".join("#" if token in held else "." for token in range(self.length)))
        return "\n".join(rows)


# (pairs, visits, ranks, most pairs of a chunk of a short document) -> rank of each chunk: see `load_balance.assign`.
Assign = Callable[[np.ndarray, Sequence[Visits], int, float], np.ndarray]

LAYOUTS: dict[str, Callable[[int, int, int], Layout]] = {
    "contiguous": Layout.contiguous,
    "zigzag": Layout.zigzag,
    "striped": Layout.striped,
}
FITTED: dict[str, Callable[[IntervalMask, int, int], Layout]] = {  # to a mask
    "balanced": Layout.balanced,
    "document_local": Layout.document_local,
}
LAYOUT_NAMES = (*LAYOUTS, *FITTED)


def _ceil(a: int, b: int) -> int:
    if not (isinstance(a, Integral) and isinstance(b, Integral)):
        raise TypeError(f"length, ranks and ulysses must be whole numbers, got length={a!r} and ranks x ulysses={b!r}")
    if b < 1:
        raise ValueError(f"ranks and ulysses must be 1 or more, got a product of {b}")
    return -(-a // b)


def _assigned(mask: IntervalMask, ranks: int, ulysses: int, per_rank: int, longest: float, assign: Assign) -> Layout:
    """Chunks assigned by a function of `load_balance`, `per_rank` to each rank, or fewer so that each fills a tile.

    longest: the length of a short document, as a fraction of a rank's tokens.
    """
    count = max(1, min(per_rank, mask.queries // (_TILE * ranks * ulysses), _CHUNKS // ranks))
    runs = Layout.contiguous(mask.queries, ranks * count, ulysses)
    tiles = _tiles(runs.chunk, ranks * count, mask.queries)
    visits = [_visits(tiles, runs.chunk, *seen(*tiles[1:])) for seen in (mask.keys_of, mask.queries_of)]
    # A token of a causal document of n tokens is in n pairs, as query and as key together.
    short = longest * (mask.queries / ranks) ** 2 / count * mask.batch
    owner = torch.from_numpy(assign(runs.pairs(mask).double().numpy(), visits, ranks, short))
    return Layout(mask.queries, runs.chunk, owner.argsort(stable=True).view(ranks, count))


def _tiles(chunk: int, chunks: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk, first and last token of each tile, if every chunk is divided into tiles of 128 tokens: int64 [tiles]."""
    begins = torch.arange(chunks)[:, None] * chunk
    inside = torch.arange(0, chunk, _TILE)
    first = (begins + inside).flatten()
    last = (begins + (inside + _TILE).clamp(max=chunk)).flatten().clamp(max=length) - 1
    tiles = torch.stack([first // chunk, first, last])
    of_chunk, first, last = tiles[:, first < length]
    return of_chunk, first, last


def _visits(tiles: tuple[Tensor, Tensor, Tensor], chunk: int, begin: Tensor, end: Tensor) -> Visits:
    """Visits of tiles that see tokens begin..end - 1 of the other side, [B, tiles]."""
    some = begin < end
    seen = torch.stack([tiles[0].expand_as(begin), begin // chunk, (end - 1) // chunk + 1])[:, some]
    (of_chunk, first, last), times = np.unique(seen.numpy(), axis=1, return_counts=True)
    return Visits(of_chunk, first, last, times * _TILE * min(chunk, _TILE))
