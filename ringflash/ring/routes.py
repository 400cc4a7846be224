"""Routes: which of a rank's keys travel round the ring, how far, and how their gradients return.

With windows of three keys and one run of tokens per rank, the next rank sees the last two keys of each run:

    >>> masks, layout = (IntervalMask.window(16, left=2),), Layout.contiguous(16, ranks=4)
    >>> [(route.last_hop, route.keys[1]) for route in routes(masks, layout)]
    [(1, 2..3), (1, 2..3), (1, 2..3), (0, none)]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.layout import Layout
from ringflash.mask import IntervalMask
from ringflash.ring.ranges import Range, Ranges

# The most chunks per rank that are distinguished when deciding which keys a rank sees; a finer layout is one run.
_CHUNKS = 64
# Gaps between needed keys that are shorter than this fraction of a shard are also sent, since every run is a message.
_GAP = 1 / 32


@dataclass(frozen=True)
class Route:
    """Which of one rank's keys, and of their gradients, are sent after each hop.

    last_hop: the last hop on which any rank sees a key. seen[s]: the keys that the rank at distance s sees, with short
    gaps filled. keys[s]: the keys received for hop s with a stride of 1, which are all that hops s and later see.
    gradients[s]: the keys with gradients on the rank that has computed hop s. Of these, forwarded[s] are sent to the
    next rank, whose hop may add to them; returned[s], which no later hop adds to, are sent to the owner.
    """

    last_hop: int
    seen: tuple[Ranges, ...]
    keys: tuple[Ranges, ...]
    gradients: tuple[Ranges, ...]
    forwarded: tuple[Ranges, ...]
    returned: tuple[Ranges, ...]

    @functools.cached_property
    def all_returned(self) -> Ranges:
        """All gradients that are sent to their owner."""
        return functools.reduce(Ranges.union, self.returned)

    @property
    def first_return(self) -> int:
        """The first hop after which gradients are sent to their owner; 0 if none are."""
        return next((s for s, ranges in enumerate(self.returned) if ranges), 0)

    def within(self, begin: int, end: int) -> Route:
        """The route of tokens begin..end - 1 alone, renumbered from begin."""
        sides = (self.seen, self.keys, self.gradients, self.forwarded, self.returned)
        return Route(self.last_hop, *(tuple(ranges.within(begin, end) for ranges in side) for side in sides))


def routes(masks: tuple[IntervalMask, ...], layout: Layout) -> tuple[Route, ...]:
    """The route of each rank's keys. All ranks compute the same routes from the masks and the layout.

    A token that any batch row needs is sent for all batch rows, because these are adjacent in memory.
    """
    ranks, gap = layout.ranks, _gap(layout.shard_length)
    seen = _seen(masks, layout, gap)
    found = []
    for source in range(ranks):
        by_hop = [seen[(source + s) % ranks][source] for s in range(ranks)]
        last_hop = max((s for s in range(1, ranks) if by_hop[s]), default=0)
        keys = needed(by_hop, 1, layout.shard_length)
        gradients, forwarded, returned = ([Ranges()] * ranks for _ in range(3))
        for s in range(1, ranks):
            gradients[s] = forwarded[s - 1].union(by_hop[s])
            over = gradients[s].without(keys[s + 1] if s < last_hop else Ranges())
            returned[s] = Ranges(r for r in over if s == last_hop or r.end - r.begin >= gap)
            forwarded[s] = gradients[s].without(returned[s])
        found.append(Route(last_hop, *map(tuple, (by_hop, keys, gradients, forwarded, returned))))
    return tuple(found)


def needed(seen: Sequence[Ranges], stride: int, length: int) -> list[Ranges]:
    """By distance d: the keys that ranks at d, d + stride, d + 2 stride and so on see; all of them for distance 0.

    seen: those that the rank at each distance sees. length: of a shard. Short gaps are filled.
    """
    gap, found = _gap(length), [Ranges([Range(0, length)]), *seen[1:]]
    for d in reversed(range(1, len(seen) - stride)):
        found[d] = found[d + stride].union(seen[d], gap)
    return found


def _gap(length: int) -> int:
    return max(1, int(length * _GAP))


def _seen(masks: tuple[IntervalMask, ...], layout: Layout, gap: int) -> list[list[Ranges]]:
    """seen[rank][source]: source's local keys that rank's queries see, with gaps shorter than `gap` filled.

    Bounds never decrease, so the keys that a run of queries sees are between the first query's lo and the last one's
    hi.
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
    """The first key that each run of queries sees, and the end of its keys, in any batch row: int64 [2, runs] per rank.

    A run is divided where bounds skip keys that no query sees, as the bounds of leading tokens do.
    """
    lo, hi = mask.lo.min(0).values, mask.hi.max(0).values
    jumps = (lo[1:] > hi[:-1] + gap).nonzero().flatten() + 1
    lo = torch.cat([lo, torch.tensor([mask.keys])])  # one more query, which sees nothing, stands for padding
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
