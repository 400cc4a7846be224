"""Ranges: the tokens of a shard that are sent, as a few runs of consecutive tokens. Each run is one message.

>>> needed = Ranges([Range(0, 4), Range(900, 1000)])
>>> needed.union(Ranges([Range(4, 10)]))
0..9 900..999
>>> needed.union(Ranges([Range(4, 10)]), gap=1000)
0..999
>>> needed.without(Ranges([Range(950, 2000)]))
0..3 900..949
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Range(NamedTuple):
    """Local indices begin..end - 1 of a shard."""

    begin: int
    end: int


class Ranges(tuple[Range, ...]):
    """Nonempty ranges in ascending order, with gaps between them."""

    @classmethod
    def covering(cls, ranges: Iterable[Range], gap: int = 1) -> Ranges:
        """The union of ranges in any order, where gaps shorter than `gap` are filled."""
        found: list[Range] = []
        for begin, end in sorted(ranges):
            if found and begin - found[-1].end < gap:
                found[-1] = Range(found[-1].begin, max(found[-1].end, end))
            else:
                found.append(Range(begin, end))
        return cls(found)

    @property
    def tokens(self) -> int:
        return sum(end - begin for begin, end in self)

    def union(self, other: Ranges, gap: int = 1) -> Ranges:
        """The union of both, where gaps shorter than `gap` are filled."""
        return Ranges.covering([*self, *other], gap)

    def without(self, other: Ranges) -> Ranges:
        """The difference: what is in these ranges and not in the other ones."""
        found = []
        for begin, end in self:
            for cut, until in other:
                if cut < end and begin < until:
                    found.append(Range(begin, cut))
                    begin = until
            found.append(Range(begin, end))
        return Ranges(r for r in found if r.begin < r.end)

    def within(self, begin: int, end: int) -> Ranges:
        """The part in begin..end - 1, renumbered from begin."""
        cut = (Range(max(r.begin, begin) - begin, min(r.end, end) - begin) for r in self)
        return Ranges(r for r in cut if r.begin < r.end)

    def __repr__(self) -> str:
        return " ".join(f"{begin}..{end - 1}" for begin, end in self) or "none"
