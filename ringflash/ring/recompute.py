"""Activation checkpointing that keeps attention results, so that recomputing a layer does not run the ring again.

    checkpoint(layer, x, use_reentrant=False, context_fn=keep_attention)
    ringflash.models.checkpoint_layers(model)    # the same for the layers of a Hugging Face model on the ring

A checkpointed layer drops its activations and runs again in the backward. All of it is local and cheap to repeat except
attention, whose keys would travel round the ring a third time. `ring_attention` therefore leaves its (out, lse) with
the checkpoint, [B, S, Hq, D] in the model's dtype and fp32 [B, Hq, S] per layer, and returns it when it runs again.
With a softcap, a sink or return_lse, 16-bit results have a residue of the size of out that is kept with them
(`kernels.compensation`). Kept results may be offloaded to host memory (`offload`). If a checkpoint does not keep them,
attention raises an error in the backward instead of running the ring again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.offload import Group, Offloaded

_active = threading.local()


def keep_attention(group: Group | None = None) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The context_fn of torch.utils.checkpoint: contexts for the forward and for its recomputation.

    group: the group with which results are offloaded; None to keep them on the device.
    """
    kept: list[_Kept] = []
    return _Role(kept, group, replays=False), _Role(kept, group, replays=True)


def kept(travels: bool) -> tuple[Tensor, ...] | None:
    """The results that attention kept in a checkpoint when its layer first ran; None if this is the first run.

    travels: whether attention sends anything. Raises RuntimeError if it would do so in a recomputation, or if a kept
    result has been changed in place.
    """
    replayed = next((role for role in _roles() if role.replays), None)
    if replayed is not None:
        return keep(*next(replayed.left).again())
    if travels and torch._C._current_graph_task_id() != -1:  # a forward inside a backward
        raise RuntimeError(
            "attention is recomputed in the backward, and the ring would run again: checkpoint layers with "
            "use_reentrant=False and context_fn=ringflash.keep_attention, or call "
            "ringflash.models.checkpoint_layers(model)"
        )
    return None


def keep(*results: Tensor) -> tuple[Tensor, ...]:
    """Keep results in every checkpoint around this layer that does not have them yet, and return them."""
    for role in _roles():
        if role.replays:
            break
        role.kept.append(_Kept.of(*results, group=role.group))
    return results


def _roles() -> Iterator[_Role]:
    """The roles of all active checkpoints, innermost first."""
    role = getattr(_active, "role", None)
    while role is not None:
        yield role
        role = role.before


@dataclass(frozen=True, eq=False)
class _Kept:
    """Detached results, since the graph holds this object and must not be held by it, and their versions."""

    results: tuple[Tensor, ...] | tuple[Offloaded, ...]  # out, lse, and out's residue if it is kept
    versions: tuple[int, ...]

    @classmethod
    def of(cls, *results: Tensor, group: Group | None = None) -> _Kept:
        kept = tuple(x.detach() for x in results) if group is None else tuple(group.offload(x) for x in results)
        return cls(kept, tuple(x._version for x in results))

    def again(self) -> tuple[Tensor, ...]:
        """The results. Raises RuntimeError if one of them was changed in place."""
        if isinstance(self.results[0], Offloaded):
            return tuple(x.get() for x in self.results)
        if tuple(x._version for x in self.results) != self.versions:
            raise RuntimeError(
                "attention's result, which a checkpoint keeps, was changed in place before the backward: make the "
                "operation that did it out of place, such as out = out + x instead of out += x"
            )
        return tuple(x.detach() for x in self.results)


class _Role:
    """What attention does in this context: compute and keep results, or replay the kept ones in order."""

    def __init__(self, kept: list[_Kept], group: Group | None, replays: bool) -> None:
        self.kept, self.group, self.replays = kept, group, replays

    def __enter__(self) -> None:
        self.before: _Role | None = getattr(_active, "role", None)
        self.left = iter(self.kept) if self.replays else iter(())
        _active.role = self

    def __exit__(self, *error: object) -> None:
        _active.role = self.before
