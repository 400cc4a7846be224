"""Intervals: all that a kernel reads of a mask, on its device. `IntervalMask.intervals` makes them.

A kernel gets the bounds of each query's keys, those of each key's queries, and an order in which to launch tiles. It
does not depend on masks, documents, layouts or rings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
# Rows per tile of the kernels that launch tiles by an Order.
ORDERED_TILES = (128, 192, 256)


@dataclass(frozen=True, eq=False)
class Intervals:
    """What a kernel reads of a mask: the keys that each query sees, and the queries that see each key.

    All tensors are int32, contiguous and on the kernel's device; their batch dimension is 1 if all batch rows agree.
    Query i sees keys ``start[i]:end[i]``; key j is seen by queries ``query_start[j]:query_end[j]``. All four vectors
    are non-decreasing, and ``start <= end``, so a tile's bounds can be read at its first and last row.
    """

    start: Tensor  # [B|1, Sq]
    end: Tensor  # [B|1, Sq]
    query_start: Tensor  # [B|1, Skv]
    query_end: Tensor  # [B|1, Skv]
    query_order: dict[int, Order]  # by rows per tile
    key_order: dict[int, Order]

    @classmethod
    def of_queries(cls, start: Tensor, end: Tensor) -> Intervals:
        """Those of a decoding step, which has no backward and launches no tiles: start and end int32 [B|1, Sq]."""
        return cls(start, end, start, end, {}, {})


@dataclass(frozen=True, eq=False)
class Order:
    """Launch order of a kernel's query tiles, or key tiles: longest first, with tiles of one document adjacent.

    A long tile launched last would leave most of the GPU idle. Tiles of one document read the same keys, which then
    come from L2. A query tile's length is the number of keys from the first that its first row sees to the last that
    its last row sees, and 0 if no row sees a key; for key tiles, keys and queries change places.
    Fields: tiles int32 [B|1, ceil(rows / rows per tile)], on the kernel's device. On the host: nonempty, the largest
    number of tiles of a batch row whose length is above 0; longest, the largest length; total, the sum of all lengths,
    averaged over batch rows.
    """

    tiles: Tensor
    nonempty: int
    longest: int
    total: float


def launch_order(lo: Tensor, hi: Tensor, rows: int, device: torch.device | str) -> Order:
    """The order of tiles of `rows` queries: by document, and longest first both among and within documents.

    lo, hi: int64 [B, Sq] on the CPU, an `IntervalMask`'s. A document here is a run of tiles whose last queries have the
    same first key, or the same end.
    """
    batch, queries = lo.shape
    if not queries:
        return Order(torch.zeros(batch, 0, dtype=torch.int32, device=device), 0, 0, 0.0)
    first = torch.arange(0, queries, rows)
    last = (first + rows).clamp(max=queries) - 1
    pairs = torch.nn.functional.pad((hi - lo).cumsum(1), (1, 0))
    walked = (hi[:, last] - lo[:, first]) * (pairs[:, last + 1] > pairs[:, first])
    same = (lo[:, last].diff(dim=1) == 0) | (hi[:, last].diff(dim=1) == 0)
    document = torch.nn.functional.pad((~same).cumsum(1), (1, 0))
    longest = torch.zeros_like(walked).scatter_reduce(1, document, walked, "amax").gather(1, document)
    tiles = torch.arange(len(first)).expand(batch, -1)
    for key in (-walked, document, -longest, walked == 0):  # the last decides, then the one before it
        tiles = tiles.gather(1, key.gather(1, tiles).argsort(dim=1, stable=True))
    return Order(
        to_device(tiles.to(torch.int32), device),
        nonempty=int((walked > 0).sum(1).max()), longest=int(walked.max()), total=float(walked.sum()) / batch,
    )  # fmt: skip


def on_cpu(function: Callable[P, T]) -> Callable[P, T]:
    """The function with its new tensors on the CPU, where plans are made, under any torch.set_default_device.

    In the context of a device, every call of torch takes longer, so it is entered only under another default.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return call


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x on a device; copies to a GPU are asynchronous.

    They read from pinned memory, which torch does not reuse until the copy is done. For pageable memory, CUDA does not
    promise that it has been read when the call returns.
    """
    from_host = x.device.type == "cpu" and torch.device(device).type == "cuda"
    return (x.pin_memory() if from_host else x).to(device, non_blocking=True)
