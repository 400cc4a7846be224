"""Activation checkpointing that keeps attention's results, so that recomputing a layer does not run the ring again.

    checkpoint(layer, x, use_reentrant=False, context_fn=keep_attention)
    model.gradient_checkpointing_enable()    # a Hugging Face model on the ring: the same, by ringflash.models

A checkpointed layer forgets its activations and is run again in the backward. Everything in it is local and cheap to
repeat but attention, whose ring would travel a third time. `ring_attention` therefore leaves its (out, lse) with the
checkpoint, [B, S, Hq, D] in the model's dtype and fp32 [B, Hq, S] a layer, and takes it from there when run again.
A checkpoint that does not keep it is met with an error in the backward, where the ring would run again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_active = threading.local()


def keep_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The context_fn of torch.utils.checkpoint: contexts for the forward and for its recomputation."""
    kept: list[tuple[Tensor, Tensor]] = []
    return _Keep(kept), _Replay(kept)


def kept_or_computed(compute: Callable[[], tuple[Tensor, Tensor]], travels: bool) -> tuple[Tensor, Tensor]:
    """compute(), or what it gave when the checkpointed layer first ran.

    travels: whether compute() sends anything. Raises RuntimeError where it would in a recomputation.
    """
    return _result(getattr(_active, "role", None), compute, travels)


class _Role:
    """What calls of attention do while the context is entered; `before`: what they did until then."""

    def __init__(self, kept: list[tuple[Tensor, Tensor]]) -> None:
        self.kept = kept
        self.before: _Role | None = None

    def __enter__(self) -> None:
        self.before = getattr(_active, "role", None)
        self.calls = 0
        _active.role = self

    def __exit__(self, *error: object) -> None:
        _active.role = self.before


class _Keep(_Role):
    """The layer's first run: compute, and keep."""


class _Replay(_Role):
    """The layer run again: the same calls in the same order get what was kept."""


def _result(role: _Role | None, compute: Callable[[], tuple[Tensor, Tensor]], travels: bool) -> tuple[Tensor, Tensor]:
    if isinstance(role, _Replay):
        role.calls += 1
        return _apart(role.kept[role.calls - 1])
    if role is not None:  # a checkpoint inside another, which keeps it too, or has it
        result = _result(role.before, compute, travels)
        role.kept.append(_apart(result))
        return result
    if travels and torch._C._current_graph_task_id() != -1:  # a forward inside a backward
        raise RuntimeError(
            "attention is recomputed in the backward, and the ring would run again: checkpoint layers with "
            "use_reentrant=False and context_fn=ringflash.keep_attention, or call "
            'model.gradient_checkpointing_enable() after set_attn_implementation("ring")'
        )
    return compute()


def _apart(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same memory, apart from the graph: what is kept must not hold the graph that holds it."""
    out, lse = result
    return out.detach(), lse.detach()
