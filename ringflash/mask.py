"""IntervalMask: every query sees one interval of keys.

Causal, full, sliding-window, packed-document, prefix and chunked attention, and every intersection of them, share one
property: query i sees exactly the keys ``lo[i] <= j < hi[i]``, and both vectors are non-decreasing. Masks with this
property are closed under the three things that distributed attention does to a mask:

- intersection (`&`): a window inside packed documents;
- restriction to some queries and some keys, each in ascending order: what a shard sees of another shard;
- transposition: the queries that see a key are one interval too, which is what a backward over key tiles needs.

    >>> print(IntervalMask.causal(8) & IntervalMask.documents([3, 5]) & IntervalMask.window(8, left=2))
    #.......
    ##......
    ###.....
    ...#....
    ...##...
    ...###..
    ....###.
    .....###

Masks live on the CPU; only the `Intervals` that a kernel reads are copied to the device (`ringflash.intervals`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringflash.intervals import ORDERED_TILES, Intervals, launch_order, on_cpu, to_device


@dataclass(frozen=True, eq=False)
class IntervalMask:
    """Which keys each query sees: ``lo[b, i] <= j < hi[b, i]``, both non-decreasing in i.

    Fields: lo, hi int64 [B|1, Sq] on the CPU (1 if all batch rows agree); keys, the number of keys, Skv.
    Raises ValueError if a bound leaves ``0..keys`` or decreases, or if lo exceeds hi; TypeError for other tensors.
    """

    lo: Tensor
    hi: Tensor
    keys: int

    def __post_init__(self) -> None:
        for name, bound in (("lo", self.lo), ("hi", self.hi)):
            check_positions(name, bound)
        check_tokens("keys", self.keys)
        if self.lo.dim() != 2 or self.lo.shape != self.hi.shape:
            raise ValueError(f"lo and hi must both be [batch, queries], got {[*self.lo.shape]} and {[*self.hi.shape]}")
        if self.lo.numel() == 0:
            return
        for name, bound in (("lo", self.lo), ("hi", self.hi)):
            if int(bound.min()) < 0 or int(bound.max()) > self.keys:
                raise ValueError(f"{name} must lie in 0..{self.keys}, got {int(bound.min())}..{int(bound.max())}")
            if bool((bound.diff(dim=1) < 0).any()):
                row, query = (bound.diff(dim=1) < 0).nonzero()[0].tolist()
                raise ValueError(f"{name} must not decrease, but does after query {query} of batch row {row}")
        if bool((self.lo > self.hi).any()):
            raise ValueError("lo must not exceed hi; an empty row has lo == hi")

    # -- the masks that models train with

    @classmethod
    @on_cpu
    def full(cls, length: int) -> IntervalMask:
        """Every query sees every key."""
        length = check_tokens("length", length)
        return cls(torch.zeros(1, length, dtype=torch.int64), torch.full((1, length), length), length)

    @classmethod
    def causal(cls, length: int) -> IntervalMask:
        """Query i sees keys 0..i."""
        return cls.prefix(length, 0)

    @classmethod
    @on_cpu
    def window(cls, length: int, left: int, right: int = 0) -> IntervalMask:
        """Query i sees keys i - left .. i + right. A transformers ``sliding_window`` of W is ``left=W - 1``."""
        length = check_tokens("length", length)
        left, right = (min(check_tokens(name, reach), length) for name, reach in (("left", left), ("right", right)))
        i = torch.arange(length)
        return cls((i - left).clamp(min=0)[None], (i + right + 1).clamp(max=length)[None], length)

    @classmethod
    @on_cpu
    def prefix(cls, length: int, prefix: int) -> IntervalMask:
        """Causal, except that the first `prefix` tokens all see each other."""
        length = check_tokens("length", length)
        if (prefix := check_tokens("prefix", prefix)) > length:
            raise ValueError(f"prefix must lie in 0..{length}, got {prefix}")
        return cls(
            torch.zeros(1, length, dtype=torch.int64), (torch.arange(length) + 1).clamp(min=prefix)[None], length
        )

    @classmethod
    @on_cpu
    def documents(cls, lengths: Any, length: int | None = None) -> IntervalMask:
        """Each token sees only its own document.

        lengths: token counts of the documents in order, as a list, array or tensor of integers; if batch rows differ, a
        list of these or two dimensions. They are cu_seqlens.diff() of flash_attn's cu_seqlens. length: that of the
        sequence, by default the largest sum of a row; tokens past a row's last document see nothing.
        """
        rows, _ = document_rows(lengths)
        longest = max(map(sum, rows))
        length = longest if length is None else check_tokens("length", length)
        if longest > length:
            hint = next(filter(None, (cumulative_hint(row, length) for row in rows)), "")
            raise ValueError(f"documents hold {longest} tokens, more than the sequence's {length}{hint}")
        bounds = [_document_bounds(torch.tensor(row, dtype=torch.int64), length) for row in rows]
        return cls(torch.stack([lo for lo, _ in bounds]), torch.stack([hi for _, hi in bounds]), length)

    @classmethod
    @on_cpu
    def chunked(cls, length: int, chunk: int) -> IntervalMask:
        """Each token sees only its own chunk of `chunk` tokens. Chunked attention is this & causal."""
        length = check_tokens("length", length)
        chunk = min(check_tokens("chunk", chunk, least=1), max(length, 1))
        first = torch.arange(length) // chunk * chunk
        return cls(first[None], (first + chunk).clamp(max=length)[None], length)

    # -- what is done to masks

    def __and__(self, other: IntervalMask) -> IntervalMask:
        """The pairs that both masks show. Raises ValueError if their shapes differ."""
        if not isinstance(other, IntervalMask):
            raise TypeError(f"an IntervalMask intersects with another one, got {type(other).__name__}")
        if self.batch != other.batch and 1 not in (self.batch, other.batch):
            raise ValueError(
                f"masks of {self.batch} and {other.batch} batch rows do not intersect: they must have as many, or one "
                f"of them 1, which stands for all"
            )
        if (self.queries, self.keys) != (other.queries, other.keys):
            raise ValueError(
                f"masks of {self.queries} x {self.keys} and {other.queries} x {other.keys} do not intersect: they must "
                f"be of one length, as in IntervalMask.documents(lengths, length)"
            )
        lo = torch.maximum(self.lo, other.lo)
        return IntervalMask(lo, torch.maximum(lo, torch.minimum(self.hi, other.hi)), self.keys)

    @on_cpu
    def windowed(self, left: int, leading_tokens: int = 0) -> tuple[IntervalMask, ...]:
        """This mask limited to a window: of the keys that a query sees, itself and the `left` keys before it.

        With leading_tokens, queries also see the first tokens of their sequence or document, StreamingLLM's attention
        sinks (arXiv:2309.17453). These are a second mask. The two share no pair: attention is over their union.
        """
        left, leading_tokens = (
            min(check_tokens(name, x), self.queries) for name, x in (("left", left), ("leading_tokens", leading_tokens))
        )
        self._check_square()
        near = self & IntervalMask.window(self.queries, left)
        if leading_tokens == 0:
            return (near,)
        before = (torch.arange(self.queries) - left).clamp(min=0)
        end = torch.minimum(torch.minimum(self.lo + leading_tokens, before), self.hi)
        return near, IntervalMask(self.lo, torch.maximum(self.lo, end), self.keys)

    @on_cpu
    def in_chunks(self, size: int) -> IntervalMask:
        """This mask limited to chunks of `size` tokens, which are counted from the beginning of each document.

        >>> mask = IntervalMask.causal(8) & IntervalMask.documents([3, 5])
        >>> mask.in_chunks(2).lo.tolist()
        [[0, 0, 2, 3, 3, 5, 5, 7]]
        """
        size = min(check_tokens("size", size, least=1), max(self.queries, 1))
        i = torch.arange(self.queries)
        begins = torch.where(self.document_starts(), i, 0).cummax(1).values
        chunk = begins + (i - begins) // size * size
        return self & IntervalMask(chunk, torch.full_like(chunk, self.keys), self.keys)

    @on_cpu
    def restrict(self, queries: Tensor, keys: Tensor) -> IntervalMask:
        """The mask between some queries and some keys, renumbered from 0: what one shard sees of another.

        queries, keys: ascending global positions, int64 [n]. Positions at or past the mask's end are padding: such
        queries see nothing, and no query sees such keys.
        """
        end = torch.full((len(self.lo), 1), self.keys)
        lo = torch.cat([self.lo, end], dim=1)[:, queries.clamp(max=self.queries)]
        hi = torch.cat([self.hi, end], dim=1)[:, queries.clamp(max=self.queries)]
        start, stop = torch.searchsorted(keys, torch.stack([lo, hi]))
        return IntervalMask(start, stop, len(keys))

    @on_cpu
    def transpose(self) -> IntervalMask:
        """The queries that see each key: key j is seen by ``count(hi <= j) <= i < count(lo <= j)``."""
        j = torch.arange(self.keys)
        return IntervalMask(*self.queries_of(j, j), self.queries)

    # -- what is read off them

    def keys_of(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The first key and the end of the keys that queries first..last see, int64 [B, ...] each."""
        return self.lo[:, first], self.hi[:, last]

    def queries_of(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The first query and the end of the queries that see keys first..last, int64 [B, ...] each."""
        begin, end = (
            torch.searchsorted(bound, x.flatten().expand(self.batch, -1).contiguous(), right=True)
            for bound, x in ((self.hi.contiguous(), first), (self.lo.contiguous(), last))
        )
        return begin.view(self.batch, *first.shape), end.view(self.batch, *last.shape)

    @property
    def queries(self) -> int:
        return self.lo.shape[1]

    @property
    def batch(self) -> int:
        return self.lo.shape[0]

    @on_cpu
    def document_starts(self) -> Tensor:
        """Whether a document starts at each token, so no pair crosses it: bool [B|1, S]. The mask must be square."""
        self._check_square()
        i = torch.arange(self.queries)
        before = torch.nn.functional.pad(self.hi[:, :-1], (1, 0))
        return (self.lo >= i) & (before <= i)

    def _check_square(self) -> None:
        if self.queries != self.keys:
            raise ValueError(f"the mask must be of one sequence with itself, got {self.queries} x {self.keys}")

    def area(self) -> int:
        """The number of visible (query, key) pairs, summed over the mask's batch rows."""
        return int((self.hi - self.lo).sum())

    @on_cpu
    def intervals(self, device: torch.device | str = "cpu") -> Intervals:
        """The mask and its transpose as a kernel reads them, copied to `device` asynchronously."""
        back = self.transpose()
        start, end, query_start, query_end = (
            to_device(x.to(torch.int32).contiguous(), device) for x in (self.lo, self.hi, back.lo, back.hi)
        )
        orders = (
            {rows: launch_order(mask.lo, mask.hi, rows, device) for rows in ORDERED_TILES} for mask in (self, back)
        )
        return Intervals(start, end, query_start, query_end, *orders)

    @on_cpu
    def dense(self) -> Tensor:
        """The mask as booleans [B|1, Sq, Skv]; for tests and pictures."""
        j = torch.arange(self.keys)
        return (self.lo[..., None] <= j) & (j < self.hi[..., None])

    def __repr__(self) -> str:
        return f"IntervalMask({self.queries} queries, {self.keys} keys, {self.batch} batch rows)"

    def __str__(self) -> str:
        rows = ["".join("#" if seen else "." for seen in row) for row in self.dense()[0].tolist()]
        return "\n".join(rows)


def rows_seen(masks: Sequence[IntervalMask], device: torch.device | str = "cpu") -> list[Tensor | None]:
    """Counts that tell which queries each of several kernel calls sees, and which later ones see, one entry per mask.

    masks: those of the calls, in order, over the same queries. An entry is int32 [2, B|1, Sq + 1]: how many of the
    queries before each one see anything under this mask, and how many do under later ones. The counts at a tile's first
    and last row tell whether it is seen. For a single mask, the entry is None.

    >>> rows_seen([IntervalMask.causal(3), IntervalMask(torch.tensor([[0, 0, 0]]), torch.tensor([[0, 1, 2]]), 3)])[0]
    tensor([[[0, 1, 2, 3]],
    <BLANKLINE>
            [[0, 0, 1, 2]]], dtype=torch.int32)
    """
    if len(masks) < 2:
        return [None] * len(masks)
    counts: list[Tensor | None] = []
    later = torch.zeros(1, masks[0].queries, dtype=torch.bool)
    for mask in reversed(masks):
        now = mask.hi > mask.lo
        both = torch.stack(torch.broadcast_tensors(now, later)).cumsum(-1)
        counts.append(to_device(torch.nn.functional.pad(both, (1, 0)).to(torch.int32), device))
        later = later | now
    return counts[::-1]


def check_tokens(name: str, count: Any, least: int = 0) -> int:
    """`count` as an int. Raises TypeError or ValueError, naming the argument, if it is not a number of tokens."""
    if not isinstance(count, Integral) or isinstance(count, bool):
        raise TypeError(f"{name} must be a whole number of tokens, got {name}={count!r:.100}")
    if count < least:
        raise ValueError(f"{name} must be {least} or more tokens, got {name}={count}")
    return int(count)


def check_positions(name: str, x: Any) -> None:
    """Raise TypeError, naming the argument, unless x is an int64 tensor on the CPU."""
    if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.device.type != "cpu":
        kind = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be an int64 tensor on the CPU, got {kind}")


def document_rows(documents: Any) -> tuple[list[list[int]], bool]:
    """Token counts of documents as one list per batch row, and whether a single list was given for all rows.

    Raises TypeError if they are not all integers, ValueError if one is negative.
    """
    given = _as_list(documents)
    alike = isinstance(given, list) and not any(isinstance(_as_list(x), list) for x in given)
    rows: list[Any] = [given] if alike else [_as_list(x) for x in given] if isinstance(given, list) else []
    counts = [[_as_list(x) for x in row] for row in rows if isinstance(row, list)]
    whole = all(isinstance(x, Integral) and not isinstance(x, bool) for row in counts for x in row)
    if not rows or len(counts) < len(rows) or not whole:
        raise TypeError(
            f"documents must be a list of ints, or a list of such lists, one per batch row (arrays and tensors of "
            f"integers too), got {documents!r:.200}"
        )
    if any(x < 0 for row in counts for x in row):
        raise ValueError(f"document lengths must not be negative, got {documents!r:.200}")
    return [[int(x) for x in row] for row in counts], alike


def check_mask(mask: Any) -> None:
    """Raise TypeError, with the value, for what is not an IntervalMask."""
    if not isinstance(mask, IntervalMask):
        raise TypeError(f"mask must be an IntervalMask, such as IntervalMask.causal(tokens), got {mask!r:.100}")


def cumulative_hint(lengths: list[int], length: int) -> str:
    """What to add to an error about counts that look like the cu_seqlens of flash_attn, which begin with 0."""
    given = len(lengths) > 1 and lengths[0] == 0 and lengths[-1] == length and lengths == sorted(lengths)
    return " (if these are cu_seqlens, give documents=cu_seqlens.diff())" if given else ""


def _as_list(x: Any) -> Any:
    """Sequences, arrays and tensors as lists, and their scalars as Python numbers; anything else unchanged."""
    if isinstance(x, Tensor | np.ndarray | np.generic):
        return x.tolist()
    return list(x) if isinstance(x, Sequence) and not isinstance(x, str) else x


def _document_bounds(lengths: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Begin and end of each token's document, int64 [length] each; empty for tokens past the last document."""
    ends = lengths.cumsum(0)
    used = int(lengths.sum())
    lo, hi = torch.full((length,), used), torch.full((length,), used)
    lo[:used] = (ends - lengths).repeat_interleave(lengths)
    hi[:used] = ends.repeat_interleave(lengths)
    return lo, hi
