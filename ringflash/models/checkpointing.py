"""Activation checkpointing of a model on the ring, set on the model itself: nothing of transformers is replaced."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from ringflash.ring.recompute import keep_attention


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Checkpoint the layers of a model on the ring; each keeps its attention's result and recomputes the rest.

    Without it, recomputing a layer would send keys round the ring again. This model's own
    `gradient_checkpointing_enable`, which transformers' Trainer calls, does the same from then on. Raises ValueError
    for a model that is not on the ring.
    """
    if (found := model.config._attn_implementation) != "ring":
        raise ValueError(
            f'checkpoint_layers needs a model on the ring, got attn_implementation="{found}": load the model with '
            f'attn_implementation="ring", or call model.gradient_checkpointing_enable()'
        )
    model.gradient_checkpointing_enable = functools.partial(_enable, model)  # type: ignore[method-assign]
    model.gradient_checkpointing_enable()


def _enable(
    model: PreTrainedModel, gradient_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
) -> None:
    """transformers' gradient_checkpointing_enable, with attention's results kept while the model is on the ring.

    Raises ValueError for use_reentrant=True and for another context_fn: neither can keep anything.
    """
    if model.config._attn_implementation == "ring":
        needed = {"use_reentrant": False, "context_fn": keep_attention}
        given = {name: x for name, x in (gradient_checkpointing_kwargs or {}).items() if x is not None}
        for name, value in needed.items():
            if given.get(name, value) is not value:
                raise ValueError(
                    f'gradient_checkpointing_kwargs={{"{name}": {given[name]!r}}} is not supported by ring attention: '
                    f"recomputing a layer would run the ring again; leave it out"
                )
        gradient_checkpointing_kwargs = given | needed
    type(model).gradient_checkpointing_enable(model, gradient_checkpointing_kwargs, *args, **kwargs)
