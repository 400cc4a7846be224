"""Collectives of a ring's ranks outside attention: whether all were given the same, and all ranks' tensors.

Each rank takes its shard of what it was given. If the ranks were given different sequences, they would compute on a
mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.intervals import to_device

if TYPE_CHECKING:
    from ringflash.ring.transport import ProcessRing
    from ringflash.ring.ulysses import Ulysses

# torch 2.13 calls it by another name, and deprecates the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REFUSED = -1  # no checksum: what a rank was given does not fit


def agree(what: str, checksum: Tensor, groups: Sequence[ProcessRing | Ulysses]) -> None:
    """Raise ValueError if the ranks' checksums differ, or one is REFUSED. A collective.

    what: what the checksum is of, for the error. A rank whose own checksum is REFUSED raises nothing: it has an error
    of its own.
    """
    comparison(what, checksum, groups)()


def comparison(
    what: str, checksum: Tensor, groups: Sequence[ProcessRing | Ulysses], why: str = "each takes its shard of them"
) -> Callable[[], None]:
    """Start `agree`, and return the function that raises its error. On GPUs, only that function waits for the ranks.

    why: why checksums must be equal, for the error.
    """
    extremes = torch.stack([checksum, -checksum])
    for group in groups:
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group.group)

    def check() -> None:
        greatest, negative_least = extremes.tolist()
        if greatest == -negative_least or checksum == REFUSED:
            return
        if negative_least == -REFUSED:
            raise ValueError(f"another rank of the ring refused its {what}: see its error")
        raise ValueError(f"{what} must be the same on every rank of a ring: {why}")

    return check


def checksum(device: torch.device, *tensors: Tensor | None) -> Tensor:
    """An int64 scalar, 0 or more, that almost surely differs for other values, another order or another shape."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for x in (x for x in tensors if x is not None):
        positions = torch.arange(1, x.numel() + 1, device=x.device)
        mixed = (x.flatten().long() + 0x9E3779B9) * (positions * 0x85EBCA6B + x.shape[-1])
        total += to_device((mixed ^ (mixed >> 29)).sum() & (2**58 - 1), device)
    return total


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x of every rank of a group, in rank order: [ranks, ...]. All have the same shape."""
    x = x.contiguous()
    found = x.new_empty(dist.get_world_size(group), *x.shape)
    _all_gather(found.view(-1), x.view(-1), group=group)
    return found
