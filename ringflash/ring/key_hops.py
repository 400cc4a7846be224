"""Key hops: whose keys and values a rank attends to at once, and where they lie in its receive buffer.

On hop 0 of a pass, a rank has its own keys. With a stride of 1, every later hop brings keys of one more rank. With a
stride of 4, it brings keys of four, at these distances before the rank:

    stride 1     0 | 1 | 2 | 3 | 4 | 5 | 6 | 7
    stride 4     0 | 1 2 3 4 | 5 6 7

The owners send the keys of hop 1. For later hops, rank r receives from rank r - stride what that rank had on its last
hop. A buffer has the chunks of which any key arrives, in the order of their positions. So each query sees one interval
of them, as it does of a single rank's keys:

    chunks of rank 5                   . 1 . . 4 . 6 .
    chunks of rank 6                   0 . . 3 . . . 7
    arriving at rank 7 on hop 1          1   3 4     7
    in its buffer                      1 3 4 7
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.layout import Layout
from ringflash.ring.ranges import Range, Ranges
from ringflash.ring.routes import Route, needed

# The forward's stride, and with how many chunks per rank it applies. A kernel then visits a tile of queries for a few
# keys of each rank, and a visit for four ranks' keys saves loads and stores of the running result. With fewer chunks,
# runs of keys are long. With more, there would be too many messages.
_STRIDE, _CHUNKS = 4, range(3, 65)


class Move(NamedTuple):
    """A message: rows of the sender's buffer of the hop before, and the receiver's rows."""

    sender: int
    source: Range
    target: Range


@dataclass(frozen=True, eq=False)
class KeyHops:
    """The hops of a pass.

    distances[s]: how far before a rank are those whose keys it has on hop s. keys[c][d]: the keys of rank c that the
    rank at distance d receives, which are all that ranks at d, d + stride, d + 2 stride and so on see.
    """

    layout: Layout
    stride: int
    distances: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[Ranges, ...], ...]

    @classmethod
    def of_backward(cls, layout: Layout, routes: tuple[Route, ...]) -> KeyHops:
        """Those of the backward, in which gradients follow the keys from rank to rank."""
        return cls._of(layout, routes, 1)

    @classmethod
    def of_forward(cls, layout: Layout, routes: tuple[Route, ...]) -> KeyHops:
        """Those of the forward: with a stride of 4 in layouts of a few chunks per rank, such as balanced ones."""
        return cls._of(layout, routes, _STRIDE if layout.chunks.shape[1] in _CHUNKS else 1)

    @classmethod
    def _of(cls, layout: Layout, routes: tuple[Route, ...], stride: int) -> KeyHops:
        last = max(route.last_hop for route in routes)
        stride = max(1, min(stride, last))
        later = (tuple(range(d, min(d + stride, last + 1))) for d in range(1, last + 1, stride))
        keys = (tuple(needed(route.seen, stride, layout.shard_length)) for route in routes)
        return cls(layout, stride, ((0,), *later), tuple(keys))

    @property
    def number(self) -> int:
        """The number of hops. On later ones, no rank would see anything."""
        return len(self.distances)

    def positions(self, rank: int) -> list[Tensor]:
        """The positions in the sequence of a rank's keys of each hop, ascending: int64 [rows]."""
        within = torch.arange(self.layout.chunk)
        chunks = (torch.tensor(self._held(rank, s), dtype=torch.int64) for s in range(self.number))
        return [(some[:, None] * self.layout.chunk + within).flatten() for some in chunks]

    def rows(self, rank: int, first: int) -> int:
        """The most rows that a rank has on hops first, first + 2, and so on, which share a buffer."""
        return max(len(self._held(rank, s)) for s in range(first, self.number, 2)) * self.layout.chunk

    def receivers(self, rank: int, hop: int) -> list[int]:
        """The ranks that receive keys of a hop from a rank."""
        away = self.distances[1] if hop == 1 else (self.stride,)
        return [(rank + d) % self.layout.ranks for d in away]

    def moves(self, receiver: int, hop: int) -> list[Move]:
        """The messages that a rank receives for a hop, sorted."""
        found, here = [], self._places(receiver, hop)
        for d, source in self._sources(receiver, hop):
            sender = source if hop == 1 else (receiver - self.stride) % self.layout.ranks
            there = self._places(sender, hop - 1)
            for chunk, begin, end in self._arriving(source, d):
                found.append(Move(sender, *(Range(at[chunk] + begin, at[chunk] + end) for at in (there, here))))
        return _joined(sorted(found))

    def _sources(self, rank: int, hop: int) -> list[tuple[int, int]]:
        """Distance and rank of those whose keys a rank has on a hop."""
        return [(d, (rank - d) % self.layout.ranks) for d in self.distances[hop]]

    def _places(self, rank: int, hop: int) -> dict[int, int]:
        """The first row of each chunk in a rank's buffer of a hop."""
        return {chunk: i * self.layout.chunk for i, chunk in enumerate(self._held(rank, hop))}

    def _held(self, rank: int, hop: int) -> list[int]:
        """The chunks in a rank's buffer of a hop. With a stride of 1, these are a whole shard."""
        if self.stride == 1 or hop == 0:
            return self._chunks[(rank - hop) % self.layout.ranks]
        arriving = (self._arriving(source, d) for d, source in self._sources(rank, hop))
        return sorted({chunk for some in arriving for chunk, _, _ in some})

    def _arriving(self, source: int, distance: int) -> Iterator[tuple[int, int, int]]:
        """The keys of a rank that arrive at a distance: a chunk, and begin and end within it."""
        size = self.layout.chunk
        for begin, end in self.keys[source][distance]:
            for i in range(begin // size, -(-end // size)):
                yield self._chunks[source][i], max(0, begin - i * size), min(size, end - i * size)

    @functools.cached_property
    def _chunks(self) -> list[list[int]]:
        return self.layout.chunks.tolist()


def _joined(moves: list[Move]) -> list[Move]:
    """The same messages, where those that follow each other in both buffers are one."""
    found = moves[:1]
    for move in moves[1:]:
        sender, source, target = found[-1]
        if (sender, source.end, target.end) == (move.sender, move.source.begin, move.target.begin):
            found[-1] = Move(sender, Range(source.begin, move.source.end), Range(target.begin, move.target.end))
        else:
            found.append(move)
    return found
