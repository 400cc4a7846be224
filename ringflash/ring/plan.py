"""AttentionPlan: what a step's attention computes on every hop, decided before any layer runs.

On hop s, rank r attends to the keys of rank (r - s) mod ranks, which have travelled s places round the ring. Four
ranks, causal, zigzag: how many of the 4 x 4 (query, key) pairs each rank computes on each hop.

    >>> from ringflash.ring.transport import Loopback
    >>> plan = AttentionPlan(IntervalMask.causal(16), Layout.zigzag(16, ranks=4), Loopback(4))
    >>> print(plan)
    rank   hop 0   hop 1   hop 2   hop 3
       0      10       8       8       8
       1      10       8       8       8
       2      10       8       8       8
       3      10       8       8       8

Two documents of eight tokens each, in one run a rank: half of the hops see nothing and are not computed.

    >>> packed = IntervalMask.causal(16) & IntervalMask.documents([8, 8])
    >>> print(AttentionPlan(packed, Layout.contiguous(16, ranks=4), Loopback(4)))
    rank   hop 0   hop 1   hop 2   hop 3
       0      10       .       .       .
       1      10      16       .       .
       2      10       .       .       .
       3      10      16       .       .

A plan is made once a step, on the CPU, by every rank for itself; layers run it without looking at the mask again and
without a host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringflash.layout import Layout
from ringflash.mask import IntervalMask, Intervals

if TYPE_CHECKING:
    from ringflash.ring.transport import Ring


@dataclass(frozen=True, eq=False)
class Hop:
    """One rank's work on one hop.

    source: the rank whose keys are here. pairs: visible (query, key) pairs, over the mask's batch rows. intervals: the
    mask between this rank's queries and those keys, on the ring's device; None where pairs is 0 and the hop is not
    computed (hop 0 always is: it starts the result).
    """

    source: int
    pairs: int
    intervals: Intervals | None


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """One step's attention: mask, layout and ring, and the hops that follow from them.

    hops[s][i] is hop s of local rank ring.local[i]. Raises ValueError where mask, layout and ring do not fit.
    """

    mask: IntervalMask
    layout: Layout
    ring: Ring
    hops: tuple[tuple[Hop, ...], ...] = field(init=False)
    _windows: dict[int, AttentionPlan] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if (self.mask.queries, self.mask.keys) != (self.layout.length, self.layout.length):
            raise ValueError(
                f"a mask of {self.mask.queries} x {self.mask.keys} does not fit a layout of {self.layout.length} tokens"
            )
        if self.layout.ranks != self.ring.size:
            raise ValueError(f"a layout for {self.layout.ranks} ranks does not fit a ring of {self.ring.size}")
        hops = [tuple(self._hop(s, rank) for rank in self.ring.local) for s in range(self.ring.size)]
        object.__setattr__(self, "hops", tuple(hops))

    def _hop(self, s: int, rank: int) -> Hop:
        source = (rank - s) % self.ring.size
        block = self.mask.restrict(self.layout.positions(rank), self.layout.positions(source))
        pairs = block.area()
        return Hop(source, pairs, block.intervals(self.ring.device) if pairs or s == 0 else None)

    def window(self, left: int) -> AttentionPlan:
        """The same plan with each query limited to itself and `left` keys before it; made once, then kept."""
        if left not in self._windows:
            mask = self.mask & IntervalMask.window(self.mask.queries, left)
            self._windows[left] = AttentionPlan(mask, self.layout, self.ring)
        return self._windows[left]

    def computed(self, i: int) -> list[int]:
        """The hops that local rank ring.local[i] computes, in order; the first is 0."""
        return [s for s, hops in enumerate(self.hops) if hops[i].intervals is not None]

    def position_ids(self, batch: int = 1) -> Tensor:
        """Global position of each token held here, int64 [local ranks * batch, shard length], on the ring's device."""
        positions = torch.stack([self.layout.positions(rank) for rank in self.ring.local])
        return positions.repeat_interleave(batch, dim=0).to(self.ring.device)

    def __str__(self) -> str:
        rows = ["rank " + " ".join(f"{f'hop {s}':>7}" for s in range(len(self.hops)))]
        for i, rank in enumerate(self.ring.local):
            counts = " ".join(f"{hops[i].pairs or '.':>7}" for hops in self.hops)
            rows.append(f"{rank:>4} {counts}")
        return "\n".join(rows)
