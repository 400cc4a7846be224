"""AttentionPlan: what a step's attention computes and sends on every hop, decided before any layer runs.

On hop s, rank r attends to the keys of rank (r - s) mod ranks, which have travelled s places round the ring. Four
ranks, causal, zigzag: how many (query, key) pairs each rank computes on each hop, and after > how many keys it then
passes on to the next rank.

    >>> from ringflash.ring.transport import Loopback
    >>> plan = AttentionPlan(IntervalMask.causal(16), Layout.zigzag(16, ranks=4), Loopback(4))
    >>> print(plan)
    rank      hop 0     hop 1     hop 2     hop 3
       0     10 > 2     8 > 4     8 > 4         8
       1     10 > 4     8 > 2     8 > 4         8
       2     10 > 4     8 > 4     8 > 2         8
       3     10 > 4     8 > 4     8 > 4         8

(Only rank 0 sees the end of the sequence, which it holds: it sends the other half of its keys.)

Windows of three keys, one run of tokens per rank: the next rank sees the last two keys of a run, the ranks after it see
none. What no later rank sees is not sent.

    >>> print(AttentionPlan(IntervalMask.window(16, left=2), Layout.contiguous(16, ranks=4), Loopback(4)))
    rank      hop 0     hop 1     hop 2     hop 3
       0      9 > 2         .         .         .
       1      9 > 2         3         .         .
       2      9 > 2         3         .         .
       3          9         3         .         .

A plan is made once a step, on the CPU, by every rank for itself; layers run it without looking at the mask again and
without a host synchronisation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringflash.layout import Layout
from ringflash.mask import IntervalMask, Intervals, check_tokens, rows_seen, to_device
from ringflash.ring.ranges import Range, Ranges
from ringflash.ring.schedule import Schedule, Shape, compile_passes

if TYPE_CHECKING:
    from ringflash.ring.transport import Ring
    from ringflash.ring.ulysses import Ulysses

# Chunks of a rank that are distinguished when working out which ranks see which keys; a finer layout counts as one run.
_CHUNKS = 64
# Gaps in what is needed that are shorter than this part of a shard are sent along: every run is a message.
_GAP = 1 / 32


@dataclass(frozen=True, eq=False)
class Hop:
    """One rank's work on one hop.

    source: the rank whose keys are here. pairs: visible (query, key) pairs, over the masks' batch rows. intervals: each
    mask between this rank's queries and those keys, on the ring's device, where it shows anything; none on a hop that
    is not computed (hop 0 always is: it starts the result). seen: for each of these, which queries it and later ones
    show anything to (`mask.rows_seen`), or None for the only one.
    """

    source: int
    pairs: int
    intervals: tuple[Intervals, ...]
    seen: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Route:
    """How far one rank's keys travel, and which of them.

    last_hop: the last hop on which any rank sees them. keys[s]: what arrives with hop s, all that hops s and later see.
    gradients[s]: what has gradients on the rank that has computed hop s. Of these, forwarded[s] are sent to the next
    rank, whose hop may add to them; returned[s], which no later hop adds to, go to the keys' owner.
    """

    last_hop: int
    keys: tuple[Ranges, ...]
    gradients: tuple[Ranges, ...]
    forwarded: tuple[Ranges, ...]
    returned: tuple[Ranges, ...]

    @functools.cached_property
    def all_returned(self) -> Ranges:
        """The gradients that return to their owner."""
        return functools.reduce(Ranges.union, self.returned)

    @property
    def first_return(self) -> int:
        """The first hop after which gradients return to their owner; 0 if none do."""
        return next((s for s, ranges in enumerate(self.returned) if ranges), 0)

    def within(self, begin: int, end: int) -> Route:
        """The same of tokens begin..end - 1 alone, counted from begin."""
        sides = (self.keys, self.gradients, self.forwarded, self.returned)
        return Route(self.last_hop, *(tuple(ranges.within(begin, end) for ranges in side) for side in sides))


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """One step's attention: mask, layout and ring, and the hops and routes that follow from them.

    mask may be a tuple of masks that share no pair: attention is then over the union of what they show. With ulysses,
    each ring shard of the layout is divided among its ranks. leading_tokens: how many of a document's first tokens the
    windows of layers (`window`) also show. hops[s][i] is hop s of local rank ring.local[i]; routes[c] is that of rank
    c's keys. token_layout: which rank holds which tokens outside attention; local_holders: which of its ranks are
    local. Raises ValueError where masks, layout and ring do not fit, TypeError where they are none.
    """

    mask: IntervalMask | tuple[IntervalMask, ...]
    layout: Layout
    ring: Ring
    ulysses: Ulysses | None = None
    leading_tokens: int = 0
    token_layout: Layout = field(init=False)
    local_holders: tuple[int, ...] = field(init=False)
    masks: tuple[IntervalMask, ...] = field(init=False)
    hops: tuple[tuple[Hop, ...], ...] = field(init=False)
    routes: tuple[Route, ...] = field(init=False)
    _narrower: dict[str, AttentionPlan] = field(init=False, default_factory=dict)
    _hops_of: dict[Range, tuple[tuple[Hop, ...], ...]] = field(init=False, default_factory=dict)
    _schedules: dict[Shape, tuple[Schedule, Schedule]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        masks = self.mask if isinstance(self.mask, tuple) else (self.mask,)
        object.__setattr__(self, "masks", masks)
        self._check()
        size, own = (1, 0) if self.ulysses is None else (self.ulysses.size, self.ulysses.rank)
        object.__setattr__(self, "token_layout", self.layout.split(size))
        object.__setattr__(self, "local_holders", tuple(rank * size + own for rank in self.ring.local))
        object.__setattr__(self, "hops", self._hops(slice(0, self.layout.shard_length)))
        object.__setattr__(self, "routes", routes(masks, self.layout))

    def _check(self) -> None:
        if not self.masks or not all(isinstance(mask, IntervalMask) for mask in self.masks):
            raise TypeError(f"mask must be an IntervalMask, or a tuple of them, got {self.mask!r:.100}")
        if not isinstance(self.layout, Layout):
            raise TypeError(f"layout must be a Layout, such as Layout.zigzag(length, ranks), got {self.layout!r:.100}")
        if not all(hasattr(self.ring, name) for name in ("size", "local", "device")):
            raise TypeError(
                f"ring must be a ProcessRing, or a Loopback of all ranks in one process, got {self.ring!r:.100}"
            )
        if self.ulysses is not None and not all(hasattr(self.ulysses, name) for name in ("size", "rank")):
            raise TypeError(
                f"ulysses must be a Ulysses of the ranks that share a ring shard, got {self.ulysses!r:.100}"
            )
        for mask in self.masks:
            if (mask.queries, mask.keys) != (self.layout.length, self.layout.length):
                raise ValueError(
                    f"a mask of {mask.queries} x {mask.keys} does not fit a layout of {self.layout.length} tokens"
                )
        check_tokens("leading_tokens", self.leading_tokens)
        if self.layout.ranks != self.ring.size:
            raise ValueError(f"a layout for {self.layout.ranks} ranks does not fit a ring of {self.ring.size}")
        for a, b in combinations(self.masks, 2):
            if shared := (a & b).area():
                raise ValueError(f"masks of one plan must share no pair, but two of them share {shared}")

    def _hops(self, rows: slice) -> tuple[tuple[Hop, ...], ...]:
        return tuple(zip(*(self._hops_of_rank(rank, rows) for rank in self.ring.local), strict=True))

    def _hops_of_rank(self, rank: int, rows: slice) -> list[Hop]:
        size, device = self.ring.size, self.ring.device
        queries, sources = self.layout.positions(rank), [(rank - s) % size for s in range(size)]
        keys = [self.layout.positions(source)[rows] for source in sources]
        blocks = [[mask.restrict(queries, some) for mask in self.masks] for some in keys]
        computed = [[x for x in some if x.area()] or (some[:1] if s == 0 else []) for s, some in enumerate(blocks)]
        seen = iter(rows_seen([x for some in computed for x in some], device))
        return [
            Hop(
                source,
                pairs=sum(x.area() * (self.batch // x.batch) for x in some),
                intervals=tuple(x.intervals(device) for x in some),
                seen=tuple(next(seen) for _ in some),
            )
            for source, some in zip(sources, computed, strict=True)
        ]

    @property
    def batch(self) -> int:
        """Batch rows that the masks tell apart; 1 where all rows agree."""
        return max(mask.batch for mask in self.masks)

    def window(self, left: int) -> AttentionPlan:
        """The same plan with each query limited to itself, `left` keys before it and `leading_tokens`; made once.

        Raises ValueError for a plan of several masks, of which a window would hide what they were given to show.
        """
        left = min(check_tokens("left", left), self.layout.length)
        return self._limited(f"windows of {left + 1}", lambda mask: mask.windowed(left, self.leading_tokens))

    def in_chunks(self, size: int) -> AttentionPlan:
        """The same plan with each query limited to its chunk of `size` tokens of its document; made once.

        Raises ValueError for a plan of several masks.
        """
        return self._limited(f"chunks of {size}", lambda mask: mask.in_chunks(size))

    def _limited(
        self, name: str, limit: Callable[[IntervalMask], IntervalMask | tuple[IntervalMask, ...]]
    ) -> AttentionPlan:
        if len(self.masks) > 1:
            raise ValueError(
                f"a plan of {len(self.masks)} masks cannot be limited to {name}: for layers with windows that also "
                f"show leading tokens, give one mask and leading_tokens=N"
            )
        if name not in self._narrower:
            with torch.device("cpu"):  # a layer asks, maybe under another default device
                self._narrower[name] = AttentionPlan(limit(self.masks[0]), self.layout, self.ring, self.ulysses)
        return self._narrower[name]

    def hops_of(self, rows: Range) -> tuple[tuple[Hop, ...], ...]:
        """`hops` with these rows of every shard's keys alone, which intervals count from the first of; made once."""
        if rows == (0, self.layout.shard_length):
            return self.hops
        if rows not in self._hops_of:
            with torch.device("cpu"):  # as in window
                self._hops_of[rows] = self._hops(slice(*rows))
        return self._hops_of[rows]

    def schedules(self, shape: Shape) -> tuple[Schedule, Schedule]:
        """The steps of a forward and a backward of layers of that shape; compiled for the first, then kept."""
        if shape not in self._schedules:
            self._schedules[shape] = compile_passes(self, shape)
        return self._schedules[shape]

    def computed(self, i: int) -> list[int]:
        """The hops that local rank ring.local[i] computes, in order; the first is 0."""
        return [s for s, hops in enumerate(self.hops) if hops[i].intervals]

    def shard(self, x: Tensor, padding: float = 0) -> Tensor:
        """The tokens held here of x [B, length, ...]: [local ranks * B, n, ...], on the ring's device.

        Raises ValueError for another length than the plan's, or another batch than its masks'.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor [B, {self.layout.length}, ...], got {type(x).__name__}")
        if x.dim() < 2 or self.batch not in (1, len(x)):
            raise ValueError(f"a plan of {self.batch} batch rows and {self.layout.length} tokens got {[*x.shape]}")
        shards = [self.token_layout.shard(x, rank, padding=padding) for rank in self.local_holders]
        return to_device(torch.cat(shards), self.ring.device)

    def position_ids(self, batch: int | None = None) -> Tensor:
        """Position in its document of each token held here, int64 [local ranks * batch, n], on the ring's device.

        RoPE sees differences of positions only, and in fp32 loses digits where they are large: so they begin again with
        each document. Past the sequence's end they are 0, so that the longest is a token's. batch: rows of the inputs,
        by default those that the masks tell apart. Called where a step's inputs are made, so that no layer waits for
        what is sent to the device. Raises ValueError for another batch than the masks'.
        """
        rows = self.batch if batch is None else batch
        if rows < 1 or self.batch not in (1, rows):
            raise ValueError(f"a plan whose masks have {self.batch} batch rows does not fit a batch of {rows}")
        return self.positions[1].repeat_interleave(rows // self.batch, dim=0)

    @functools.cached_property
    def positions(self) -> Tensor:
        """Where each token held is in the sequence, and where in its document.

        A document begins where no pair of the masks lies across. int64 [2, local ranks * batch, n], on the ring's
        device.
        """
        begins = torch.where(self._divides(), torch.arange(self.layout.length), 0).cummax(1).values
        in_sequence = torch.stack([self.token_layout.positions(rank) for rank in self.local_holders])
        in_sequence = in_sequence.repeat_interleave(self.batch, dim=0)
        in_document = in_sequence - torch.cat([self.token_layout.shard(begins, rank) for rank in self.local_holders])
        in_document[in_sequence >= self.layout.length] = 0
        return to_device(torch.stack([in_sequence, in_document]), self.ring.device)

    def document_lengths(self, batch: int) -> Tensor:
        """Tokens of the document of each token held, int64 [local ranks * batch, n], on the CPU."""
        return self._document_lengths.repeat_interleave(batch // self.batch, dim=0)

    @functools.cached_property
    def _document_lengths(self) -> Tensor:
        with torch.device("cpu"):  # as in window
            document = self._divides().cumsum(1)
            counts = torch.zeros(self.batch, self.layout.length + 1, dtype=torch.int64)
            lengths = counts.scatter_add_(1, document, torch.ones_like(document)).gather(1, document)
            return torch.cat([self.token_layout.shard(lengths, rank) for rank in self.local_holders])

    def _divides(self) -> Tensor:
        """Where documents begin, bool [batch, length]."""
        return functools.reduce(torch.logical_and, (mask.divides().expand(self.batch, -1) for mask in self.masks))

    def __repr__(self) -> str:
        return f"AttentionPlan({self.mask!r}, {self.layout!r}, ring of {self.ring.size})"

    def __str__(self) -> str:
        cells = [[self._summary(s, hop) for hop in hops] for s, hops in enumerate(self.hops)]
        width = max(10, 2 + max(len(cell) for column in cells for cell in column))
        rows = ["rank " + "".join(f"{f'hop {s}':>{width}}" for s in range(len(cells)))]
        for i, rank in enumerate(self.ring.local):
            rows.append(f"{rank:>4} " + "".join(f"{column[i]:>{width}}" for column in cells))
        return "\n".join(rows)

    def _summary(self, s: int, hop: Hop) -> str:
        keys = self.routes[hop.source].keys
        forwarded = keys[s + 1].tokens if s + 1 < len(keys) else 0
        return f"{hop.pairs or '.'}" + (f" > {forwarded}" if forwarded else "")


def routes(masks: tuple[IntervalMask, ...], layout: Layout) -> tuple[Route, ...]:
    """Each rank's route; the same on all ranks, since each knows the masks and the layout.

    Where batch rows hold different documents, what any row needs travels of all rows: a token's rows lie together.
    """
    ranks, gap = layout.ranks, max(1, int(layout.shard_length * _GAP))
    seen = _seen(masks, layout, gap)
    found = []
    for source in range(ranks):
        by_hop = [seen[(source + s) % ranks][source] for s in range(ranks)]
        last_hop = max((s for s in range(1, ranks) if by_hop[s]), default=0)
        keys, later = [Ranges([Range(0, layout.shard_length)])] * ranks, Ranges()
        for s in reversed(range(1, ranks)):
            keys[s] = later = later.union(by_hop[s], gap)
        gradients, forwarded, returned = ([Ranges()] * ranks for _ in range(3))
        for s in range(1, ranks):
            gradients[s] = forwarded[s - 1].union(by_hop[s])
            over = gradients[s].without(keys[s + 1] if s < last_hop else Ranges())
            returned[s] = Ranges(r for r in over if s == last_hop or r.end - r.begin >= gap)
            forwarded[s] = gradients[s].without(returned[s])
        found.append(Route(last_hop, *map(tuple, (keys, gradients, forwarded, returned))))
    return tuple(found)


def _seen(masks: tuple[IntervalMask, ...], layout: Layout, gap: int) -> list[list[Ranges]]:
    """seen[rank][source]: source's local keys that rank's queries see, and gaps between them shorter than `gap`.

    Bounds never decrease, so the keys that a run of queries sees lie between the first one's lo and the last one's hi.
    """
    bounds = [_keys_seen(mask, layout, gap) for mask in masks]
    of_rank = [torch.cat(some, dim=1) for some in zip(*bounds, strict=True)]  # first keys and ends, [2, runs]
    seen: list[list[Ranges]] = [[] for _ in range(layout.ranks)]
    for source in range(layout.ranks):
        positions = torch.searchsorted(layout.positions(source), torch.cat(of_rank, dim=1))
        for rank, (begin, end) in enumerate(positions.split([x.shape[1] for x in of_rank], dim=1)):
            some = begin < end
            seen[rank].append(Ranges.covering(map(Range, begin[some].tolist(), end[some].tolist()), gap))
    return seen


def _keys_seen(mask: IntervalMask, layout: Layout, gap: int) -> list[Tensor]:
    """First key and end of those that runs of queries see, in any batch row: int64 [2, runs] for each rank.

    A run is divided where bounds jump over keys that no query sees, as those of a document's first tokens do.
    """
    lo, hi = mask.lo.min(0).values, mask.hi.max(0).values
    jumps = (lo[1:] > hi[:-1] + gap).nonzero().flatten() + 1
    lo = torch.cat([lo, torch.tensor([mask.keys])])  # one more query that sees nothing stands for padding past the end
    seen = []
    for first, last in zip(*_query_runs(layout), strict=True):
        begins = torch.cat([first, jumps]).unique()
        r = torch.searchsorted(first, begins, right=True) - 1
        inside = (r >= 0) & (begins <= last[r])
        begins, r = begins[inside], r[inside]
        ends = torch.minimum(last[r], torch.cat([begins[1:] - 1, last[-1:]]))
        begin, end = lo[begins.clamp(max=mask.queries)], hi[ends.clamp(max=mask.queries - 1)]
        seen.append(torch.stack([begin, torch.maximum(begin, end)]))
    return seen


def _query_runs(layout: Layout) -> tuple[Tensor, Tensor]:
    """First and last global position of each run of a rank's queries, int64 [ranks, runs] twice."""
    first = layout.chunks * layout.chunk
    last = first + layout.chunk - 1
    if first.shape[1] > _CHUNKS:
        return first[:, :1], last[:, -1:]
    return first, last
