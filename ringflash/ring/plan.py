"""AttentionPlan: what a step's attention computes and sends on every hop, decided before any layer runs.

On hop s, rank r attends to the keys of rank (r - s) mod ranks, which have been sent s times around the ring. For four
ranks and a causal mask in zigzag layout, this shows the number of (query, key) pairs that each rank computes on each
hop and, after >, the number of keys that it forwards to the next rank:

    >>> from ringflash.ring.transport import Loopback
    >>> plan = AttentionPlan(IntervalMask.causal(16), Layout.zigzag(16, ranks=4), Loopback(4))
    >>> print(plan)
    rank      hop 0     hop 1     hop 2     hop 3
       0     10 > 2     8 > 4     8 > 4         8
       1     10 > 4     8 > 2     8 > 4         8
       2     10 > 4     8 > 4     8 > 2         8
       3     10 > 4     8 > 4     8 > 4         8

(Rank 0 holds the end of the sequence, which only its own queries see. It sends the other half of its keys.)

With windows of three keys and one run of tokens per rank, only the next rank sees keys of a run, the last two. Keys
that no later rank sees are not sent.

    >>> print(AttentionPlan(IntervalMask.window(16, left=2), Layout.contiguous(16, ranks=4), Loopback(4)))
    rank      hop 0     hop 1     hop 2     hop 3
       0      9 > 2         .         .         .
       1      9 > 2         3         .         .
       2      9 > 2         3         .         .
       3          9         3         .         .

In the forward, a hop of a balanced layout has the keys of four ranks (`ring.key_hops`). Every rank makes the plan for
itself, once per step, on the CPU. Layers run it without reading the mask again and without a host synchronisation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ringflash.intervals import Intervals, on_cpu, to_device
from ringflash.layout import Layout
from ringflash.mask import IntervalMask, check_tokens, rows_seen
from ringflash.ring.collectives import agree, checksum, gathered
from ringflash.ring.compiler import compile_passes
from ringflash.ring.key_hops import KeyHops
from ringflash.ring.ranges import Range
from ringflash.ring.routes import Route, routes
from ringflash.ring.schedule import Schedule, Shape
from ringflash.ring.sequences import Sequences

if TYPE_CHECKING:
    from ringflash.ring.transport import Ring
    from ringflash.ring.ulysses import Ulysses


@dataclass(frozen=True, eq=False)
class Hop:
    """One rank's work on one hop.

    - keys: the number of keys that are processed.
    - pairs: visible (query, key) pairs, over the masks' batch rows.
    - intervals: the nonempty masks between this rank's queries and those keys, on the ring's device. A hop without any
      is skipped, except hop 0, which starts the result.
    - seen: for each of these, which queries see a key in it and in later ones (`mask.rows_seen`); None if there is
      only one.
    """

    keys: int
    pairs: int
    intervals: tuple[Intervals, ...]
    seen: tuple[Tensor | None, ...]


class AttentionPlan:
    """One step's attention: mask, layout and ring, and the hops and routes that follow from them.

    - mask: an IntervalMask, or a tuple of masks that share no pair; attention is then over the union of their pairs.
    - layout: which rank of the ring holds which tokens.
    - ring: a ProcessRing, or a Loopback of all ranks in one process.
    - ulysses: the ranks among which each ring shard of the layout is divided.
    - leading_tokens: the number of a document's first tokens that are also visible in a layer's `window`.

    What follows from them:

    - routes[c]: the route of rank c's keys.
    - key_hops: whose keys each hop of the forward brings, and each hop of the backward.
    - hops[s][i]: hop s of local rank ring.local[i], in the backward; forward_hops: the same of the forward.
    - token_layout: which rank holds which tokens outside attention.
    - local_ranks: the ranks of token_layout that are local.

    Raises ValueError if masks, layout and ring do not fit each other, and TypeError for other types.

    This is not a dataclass: FSDP with mixed precision rebuilds every dataclass among the arguments of a module.
    """

    @on_cpu
    def __init__(
        self,
        mask: IntervalMask | tuple[IntervalMask, ...],
        layout: Layout,
        ring: Ring,
        ulysses: Ulysses | None = None,
        leading_tokens: int = 0,
    ) -> None:
        self.mask, self.layout, self.ring, self.ulysses = mask, layout, ring, ulysses
        self.leading_tokens = leading_tokens
        self.masks = mask if isinstance(mask, tuple) else (mask,)
        self._check()
        size, own = (1, 0) if ulysses is None else (ulysses.size, ulysses.rank)
        self.token_layout = layout.split(size)
        self.local_ranks = tuple(rank * size + own for rank in ring.local)
        self.routes: tuple[Route, ...] = routes(self.masks, layout)
        self.key_hops = KeyHops.of_forward(layout, self.routes), KeyHops.of_backward(layout, self.routes)
        self.hops = self._hops(self._keys_of_each_rank)
        alike = self.key_hops[0].stride == self.key_hops[1].stride
        self.forward_hops = self.hops if alike else self._hops(self.key_hops[0].positions)
        self._narrower: dict[str, AttentionPlan] = {}
        self._hops_of: dict[Range, tuple[tuple[Hop, ...], ...]] = {}
        self._schedules: dict[Shape, tuple[Schedule, Schedule]] = {}
        self._sequences: dict[int, Sequences] = {}

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

    def _keys_of_each_rank(self, rank: int, rows: slice = slice(None)) -> list[Tensor]:
        """The positions of these rows of every rank's keys, in the order in which a rank has them on its hops."""
        return [self.layout.positions((rank - s) % self.ring.size)[rows] for s in range(self.ring.size)]

    def _hops(self, keys: Callable[[int], list[Tensor]]) -> tuple[tuple[Hop, ...], ...]:
        return tuple(zip(*(self._hops_of_rank(rank, keys(rank)) for rank in self.ring.local), strict=True))

    def _hops_of_rank(self, rank: int, keys: list[Tensor]) -> list[Hop]:
        queries, device = self.layout.positions(rank), self.ring.device
        blocks = [[mask.restrict(queries, some) for mask in self.masks] for some in keys]
        computed = [[x for x in some if x.area()] or (some[:1] if s == 0 else []) for s, some in enumerate(blocks)]
        seen = iter(rows_seen([x for some in computed for x in some], device))
        return [
            Hop(
                len(of_hop),
                pairs=sum(x.area() * (self.batch // x.batch) for x in some),
                intervals=tuple(x.intervals(device) for x in some),
                seen=tuple(next(seen) for _ in some),
            )
            for of_hop, some in zip(keys, computed, strict=True)
        ]

    @property
    def batch(self) -> int:
        """Batch rows of the masks; 1 if all rows agree."""
        return max(mask.batch for mask in self.masks)

    def window(self, left: int) -> AttentionPlan:
        """The plan with each query limited to itself, `left` keys before it and `leading_tokens`; made once.

        Raises ValueError for a plan of several masks, since a window would hide pairs that these show on purpose.
        """
        left = min(check_tokens("left", left), self.layout.length)
        return self._limited(f"windows of {left + 1}", lambda mask: mask.windowed(left, self.leading_tokens))

    def in_chunks(self, size: int) -> AttentionPlan:
        """The plan with each query limited to its chunk of `size` tokens of its document; made once.

        Raises ValueError for a plan of several masks.
        """
        return self._limited(f"chunks of {size}", lambda mask: mask.in_chunks(size))

    @on_cpu
    def _limited(
        self, name: str, limit: Callable[[IntervalMask], IntervalMask | tuple[IntervalMask, ...]]
    ) -> AttentionPlan:
        if len(self.masks) > 1:
            raise ValueError(
                f"a plan of {len(self.masks)} masks cannot be limited to {name}: for layers with windows that also "
                f"show leading tokens, give one mask and leading_tokens=N"
            )
        if name not in self._narrower:
            self._narrower[name] = AttentionPlan(limit(self.masks[0]), self.layout, self.ring, self.ulysses)
        return self._narrower[name]

    @on_cpu
    def compare_ranks(self) -> None:
        """Raise ValueError unless all ranks made the same plan. A collective, as `ring_inputs` has for its arguments.

        Ranks with other plans send messages of other sizes, which hang or crash, or attend to other keys than they mean
        to.
        """
        bounds = (x for mask in self.masks for x in (mask.lo, mask.hi))
        numbers = torch.tensor([self.layout.length, self.layout.chunk, self.leading_tokens])
        total = checksum(self.ring.device, *bounds, self.layout.chunks, numbers)
        groups: list[Any] = [group for group in (self.ring, self.ulysses) if hasattr(group, "group")]
        agree("mask, layout and leading_tokens", total, groups)

    @on_cpu
    def hops_of(self, rows: Range) -> tuple[tuple[Hop, ...], ...]:
        """`hops` for these rows of every shard's keys alone; intervals count from the first row. Made once."""
        if rows == (0, self.layout.shard_length):
            return self.hops
        if rows not in self._hops_of:
            self._hops_of[rows] = self._hops(lambda rank: self._keys_of_each_rank(rank, slice(*rows)))
        return self._hops_of[rows]

    def schedules(self, shape: Shape) -> tuple[Schedule, Schedule]:
        """The forward and backward schedules of layers of this shape, compiled once."""
        if shape not in self._schedules:
            self._schedules[shape] = compile_passes(
                self.ring.local, self.routes, self.key_hops, _pairs(self.forward_hops),
                lambda rows: _pairs(self.hops_of(rows)), shape, self.writes_gradients(shape.dtype),
            )  # fmt: skip
        return self._schedules[shape]

    def writes_gradients(self, dtype: torch.dtype) -> bool:
        """Whether one call of a kernel computes dk and dv of inputs of that dtype, and so writes them in 16 bits.

        Else calls add to fp32 sums: those of several hops or masks, and those that Ulysses adds up over its ranks.
        """
        calls = len(self.masks) * (1 + max(route.last_hop for route in self.routes))
        return calls == 1 and self.ulysses is None and dtype != torch.float32

    def computed(self, i: int) -> list[int]:
        """The hops that local rank ring.local[i] computes, in order; the first is 0."""
        return [s for s, hops in enumerate(self.hops) if hops[i].intervals]

    def shard(self, x: Tensor, padding: float = 0) -> Tensor:
        """This process's tokens of x [B, length, ...]: [local ranks * B, n, ...], on the ring's device.

        Raises ValueError if x does not have the plan's length and its masks' batch.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor [B, {self.layout.length}, ...], got {type(x).__name__}")
        if x.dim() < 2 or self.batch not in (1, len(x)):
            raise ValueError(f"a plan of {self.batch} batch rows and {self.layout.length} tokens got {[*x.shape]}")
        shards = [self.token_layout.shard(x, rank, padding=padding) for rank in self.local_ranks]
        return to_device(torch.cat(shards), self.ring.device)

    def unshard(self, x: Tensor) -> Tensor:
        """Whole sequences [B, length, ...] on every rank, from their tokens x [local ranks * B, n, ...]: undoes shard.

        Without gradients. A collective, in which all ranks of the ring and of Ulysses take part.
        """
        n = self.token_layout.shard_length
        if x.dim() < 2 or len(x) % len(self.ring.local) or x.shape[1] != n:
            raise ValueError(f"x must be [{len(self.ring.local)} local ranks * B, {n}, ...], got {[*x.shape]}")
        shards = x.detach().unflatten(0, (len(self.ring.local), -1))
        if self.ulysses is not None:
            shards = gathered(shards, self.ulysses.group).transpose(0, 1).flatten(0, 1)
        if (group := getattr(self.ring, "group", None)) is not None:
            shards = gathered(shards, group).flatten(0, 1)
        return self.token_layout.unshard(shards.unbind())

    def position_ids(self, batch: int | None = None) -> Tensor:
        """The position of each local token in its document, int64 [local ranks * batch, n], on the ring's device.

        RoPE depends only on differences of positions, and large positions lose digits in fp32, so positions restart at
        each document. Past the end of the sequence they are 0, so the largest position is that of a token. batch: rows
        of the inputs, by default those of the masks. Call this where a step's inputs are made, so that no layer waits
        for the copy to the device. Raises ValueError if the batch does not fit the masks.
        """
        rows = self.batch if batch is None else batch
        if rows < 1 or self.batch not in (1, rows):
            raise ValueError(f"a plan whose masks have {self.batch} batch rows does not fit a batch of {rows}")
        return self.positions[1].repeat_interleave(rows // self.batch, dim=0)

    @functools.cached_property
    @on_cpu
    def positions(self) -> Tensor:
        """The position of each local token in the sequence, and in its document.

        A document begins at a token if no pair of the masks crosses it. int64 [2, local ranks * batch, n], on the
        ring's device.
        """
        begins = self._document_begins()
        in_sequence = torch.stack([self.token_layout.positions(rank) for rank in self.local_ranks])
        in_sequence = in_sequence.repeat_interleave(self.batch, dim=0)
        in_document = in_sequence - torch.cat([self.token_layout.shard(begins, rank) for rank in self.local_ranks])
        in_document[in_sequence >= self.layout.length] = 0
        return to_device(torch.stack([in_sequence, in_document]), self.ring.device)

    @on_cpu
    def sequences(self, rows: int) -> Sequences:
        """The order of all shards' tokens, for inputs of `rows` batch rows; made once.

        Call this where a step's inputs are made, as `position_ids`. Raises ValueError if the rows do not fit the masks,
        or if the mask is not causal within documents, which is what a recurrence computes.
        """
        if rows < 1 or rows % self.batch:
            raise ValueError(f"a plan whose masks have {self.batch} batch rows does not fit a batch of {rows}")
        if rows not in self._sequences:
            starts = self._causal_starts().repeat_interleave(rows // self.batch, dim=0)
            self._sequences[rows] = Sequences.of(self.layout, starts, self.ring.device)
        return self._sequences[rows]

    def document_lengths(self, batch: int) -> Tensor:
        """The length of each local token's document, int64 [local ranks * batch, n], on the CPU."""
        return self._document_lengths.repeat_interleave(batch // self.batch, dim=0)

    @functools.cached_property
    @on_cpu
    def _document_lengths(self) -> Tensor:
        document = self._document_starts().cumsum(1)
        counts = torch.zeros(self.batch, self.layout.length + 1, dtype=torch.int64)
        lengths = counts.scatter_add_(1, document, torch.ones_like(document)).gather(1, document)
        return torch.cat([self.token_layout.shard(lengths, rank) for rank in self.local_ranks])

    def _document_starts(self) -> Tensor:
        """Where documents begin, bool [batch, length]."""
        starts = (mask.document_starts().expand(self.batch, -1) for mask in self.masks)
        return functools.reduce(torch.logical_and, starts)

    def _document_begins(self) -> Tensor:
        """The first token of each token's document, int64 [batch, length]."""
        return torch.where(self._document_starts(), torch.arange(self.layout.length), 0).cummax(1).values

    def _causal_starts(self) -> Tensor:
        """Where documents begin, bool [batch, length]. Raises ValueError if the mask is not causal within them."""
        first, ends = self.masks[0], torch.arange(1, self.layout.length + 1)
        if len(self.masks) > 1 or not (torch.equal(first.lo, self._document_begins()) and (first.hi == ends).all()):
            raise ValueError(
                f"mask={self.mask!r:.100} is not causal within documents. Layers that carry a state over tokens see "
                f"exactly the tokens of their document up to their own, as in IntervalMask.causal(S) & "
                f"IntervalMask.documents(...)"
            )
        return self._document_starts()

    def __repr__(self) -> str:
        return f"AttentionPlan({self.mask!r}, {self.layout!r}, ring of {self.ring.size})"

    def __str__(self) -> str:
        cells = [[self._summary(i, s, hop) for i, hop in enumerate(hops)] for s, hops in enumerate(self.hops)]
        width = max(10, 2 + max(len(cell) for column in cells for cell in column))
        rows = ["rank " + "".join(f"{f'hop {s}':>{width}}" for s in range(len(cells)))]
        for i, rank in enumerate(self.ring.local):
            rows.append(f"{rank:>4} " + "".join(f"{column[i]:>{width}}" for column in cells))
        return "\n".join(rows)

    def _summary(self, i: int, s: int, hop: Hop) -> str:
        keys = self.routes[(self.ring.local[i] - s) % self.ring.size].keys
        forwarded = keys[s + 1].tokens if s + 1 < len(keys) else 0
        return f"{hop.pairs or '.'}" + (f" > {forwarded}" if forwarded else "")


def _pairs(hops: tuple[tuple[Hop, ...], ...]) -> list[list[int]]:
    """Visible pairs of each local rank on each hop."""
    return [[hop.pairs for hop in of_rank] for of_rank in zip(*hops, strict=True)]
