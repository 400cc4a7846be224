"""Activation checkpointing of a model on the ring. It is set on the model itself; transformers is not patched.

Between forward and backward, a layer keeps its input and its attention result, (out, lse). `Keep` says where.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers import PreTrainedModel

from ringflash.models.freezing import layers_of
from ringflash.offload import HostStore, Offloaded
from ringflash.ring.recompute import keep_attention

ATTENTION_PLACES = ("gpu", "host", "recomputed")
INPUT_PLACES = ("gpu", "host")


@dataclass(frozen=True)
class Keep:
    """Where checkpointed layers keep their inputs and attention results for the backward.

    attention: "gpu"; "host", pinned memory; or "recomputed", which runs attention's forward again and needs a ring of
    one rank. inputs: "gpu" or "host". "host:3" and "recomputed:3" apply to the first 3 layers, and the others use the
    GPU. Raises ValueError for other values.
    """

    attention: str = "gpu"
    inputs: str = "gpu"

    def __post_init__(self) -> None:
        for name, places in (("attention", ATTENTION_PLACES), ("inputs", INPUT_PLACES)):
            if (refusal := place_refusal(getattr(self, name), places)) is not None:
                raise ValueError(f"{name}={getattr(self, name)} {refusal}")

    @property
    def uses_host(self) -> bool:
        """Whether anything is kept in host memory."""
        return any(place == "host" and layers != 0 for place, layers in self._places)

    @property
    def recomputes_attention(self) -> bool:
        """Whether attention's forward runs again in the backward of some layer."""
        return self._places[0][0] == "recomputed" and self._places[0][1] != 0

    @property
    def layers(self) -> int:
        """The number of layers that a model must have at least: the largest N given."""
        return max(layers or 0 for _, layers in self._places)

    def at(self, layer: int) -> Keep:
        """Where one layer, counted from 0, keeps its tensors."""
        return Keep(*(place if layers is None or layer < layers else "gpu" for place, layers in self._places))

    @property
    def _places(self) -> tuple[tuple[str, int | None], ...]:
        """(place, number of layers or None for all) of attention results and of layer inputs."""
        return tuple(
            (place, int(layers) if layers else None)
            for place, _, layers in (x.partition(":") for x in (self.attention, self.inputs))
        )


def place_refusal(value: str, places: Sequence[str]) -> str | None:
    """None, or why a value is not one of the places, optionally followed by :N."""
    place, colon, layers = value.partition(":")
    if place in places and (not colon or (place != "gpu" and layers.isdecimal())):
        return None
    counted = " or ".join(f"{name}:N" for name in places if name != "gpu")
    return f"is not one of {', '.join(places)}, nor {counted}, for the first N layers"


def checkpoint_layers(model: PreTrainedModel, keep: Keep | None = None) -> None:
    """Checkpoint the layers of a model on the ring: each keeps its attention result and recomputes the rest.

    Otherwise, recomputing a layer would send keys round the ring again. From then on, the model's own
    `gradient_checkpointing_enable`, which transformers' Trainer calls, does the same. keep: where layers keep their
    tensors, by default on the GPU. Raises ValueError for a model that is not on the ring.
    """
    if (found := model.config._attn_implementation) != "ring":
        raise ValueError(
            f'checkpoint_layers needs a model on the ring, got attn_implementation="{found}": load the model with '
            f'attn_implementation="ring", or call model.gradient_checkpointing_enable()'
        )
    model.gradient_checkpointing_enable = functools.partial(_enable, model, keep or Keep())  # type: ignore[method-assign]
    model.gradient_checkpointing_enable()


def _enable(
    model: PreTrainedModel,
    keep: Keep,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """transformers' gradient_checkpointing_enable, which also keeps attention results while the model is on the ring.

    Raises ValueError for use_reentrant=True and for another context_fn, with which nothing can be kept.
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
    with warnings.catch_warnings():  # newer versions of transformers call this for their new name of it, too
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
        type(model).gradient_checkpointing_enable(model, gradient_checkpointing_kwargs, *args, **kwargs)
    if model.config._attn_implementation != "ring":
        return
    # For use_reentrant=True, transformers makes embeddings need a gradient: frozen layers would run a backward.
    model.disable_input_require_grads()
    if keep != Keep():
        _set_places(model, keep, gradient_checkpointing_kwargs or {})


def host_store(model: PreTrainedModel) -> HostStore | None:
    """The store of the tensors that a model's layers keep in host memory, if there are any."""
    return getattr(model, "host_store", None)


def _set_places(model: PreTrainedModel, keep: Keep, options: dict[str, Any]) -> None:
    """Set on each layer where it keeps its tensors."""
    if keep.uses_host:
        model.host_store = HostStore()  # type: ignore[assignment]
    for number, layer in enumerate(layers_of(model)):
        call = functools.partial(_checkpointed, keep.at(number), host_store(model), number == 0, options, layer)
        layer._gradient_checkpointing_func = call  # type: ignore[assignment]


def _checkpointed(
    keep: Keep,
    store: HostStore | None,
    first: bool,
    options: dict[str, Any],
    layer: nn.Module,
    call: Callable[..., Any],
    *args: Any,
) -> Any:
    """torch's checkpoint of a layer's call, which keeps tensors where `keep` says; none if it has no backward."""
    if not torch.is_grad_enabled():
        return call(*args)
    group = None if store is None or not keep.uses_host else store.group(first)
    if not any(x.requires_grad for x in (*args, *layer.parameters()) if isinstance(x, Tensor)):
        return call(*args)  # a frozen layer below those that train
    context_fn: Callable[[], Any] = keep_attention
    if keep.attention == "host":
        context_fn = functools.partial(keep_attention, group)
    elif keep.attention == "recomputed":
        context_fn = noop_context_fn

    def pack(x: Tensor) -> Tensor | Offloaded:
        assert group is not None
        return group.offload(x) if x.is_floating_point() and x.numel() else x

    def unpack(kept: Tensor | Offloaded) -> Tensor:
        return kept.get() if isinstance(kept, Offloaded) else kept

    with saved_tensors_hooks(pack, unpack) if keep.inputs == "host" else nullcontext():
        return checkpoint(call, *args, **(options | {"context_fn": context_fn}))
