"""Runs: tokens of a shard that travel, as few stretches of neighbours, each of which is one message.

>>> needed = Runs([Run(0, 4), Run(900, 1000)])
>>> needed.union(Runs([Run(4, 10)]))
0..9 900..999
>>> needed.union(Runs([Run(4, 10)]), gap=1000)
0..999
>>> needed.without(Runs([Run(950, 2000)]))
0..3 900..949
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Run(NamedTuple):
    """Local indices begin..end - 1 of a shard."""

    begin: int
    end: int


class Runs(tuple[Run, ...]):
    """Runs that are not empty, ascending, with gaps between them."""

    @classmethod
    def covering(cls, runs: Iterable[Run], gap: int = 1) -> Runs:
        """Those of any runs, in any order, and the gaps between that are shorter than `gap`."""
        found: list[Run] = []
        for begin, end in sorted(runs):
            if found and begin - found[-1].end < gap:
                found[-1] = Run(found[-1].begin, max(found[-1].end, end))
            else:
                found.append(Run(begin, end))
        return cls(found)

    @property
    def tokens(self) -> int:
        return sum(end - begin for begin, end in self)

    def union(self, other: Runs, gap: int = 1) -> Runs:
        """What either holds, and the gaps between that are shorter than `gap`."""
        return Runs.covering([*self, *other], gap)

    def without(self, other: Runs) -> Runs:
        """What is here and not in the other."""
        found = []
        for begin, end in self:
            for cut, until in other:
                if cut < end and begin < until:
                    found.append(Run(begin, cut))
                    begin = until
            found.append(Run(begin, end))
        return Runs(run for run in found if run.begin < run.end)

    def within(self, begin: int, end: int) -> Runs:
        """What lies in begin..end - 1, counted from begin."""
        cut = (Run(max(run.begin, begin) - begin, min(run.end, end) - begin) for run in self)
        return Runs(run for run in cut if run.begin < run.end)

    def __repr__(self) -> str:
        return " ".join(f"{begin}..{end - 1}" for begin, end in self) or "none"
