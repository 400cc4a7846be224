"""Which linear layers `model.linear_dtype=fp8` computes in 8 bits: those of attention and of MLPs.

Embeddings, lm_head, routers, experts, linear attention and MLPs that `models.mlp` does not know keep model.dtype.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ringflash.errors import ConfigError
from ringflash.models.float8 import MULTIPLE, WIDEST, in_float8, set_float8
from ringflash.models.mlp import linear_layers
from ringflash.models.quantized import shape_of

ATTENTIONS = ("self_attn", "attention")  # names of attention in a layer, in all families


def use_float8(model: PreTrainedModel) -> None:
    """Compute the linear layers of a model's attention and MLPs in 8 bits.

    Raises ConfigError if there are none, and for one whose sizes do not fit.
    """
    layers = _layers(model)
    if not layers:
        raise ConfigError(
            f"model.linear_dtype=fp8: model_type={model.config.model_type} has no linear layers in attention, nor in "
            f"an MLP that ringflash knows; set model.linear_dtype=null"
        )
    for name, layer in layers.items():
        if any(size % MULTIPLE or size > WIDEST for size in shape_of(layer.weight)):
            raise ConfigError(
                f"model.linear_dtype=fp8 needs linear layers whose sizes are multiples of {MULTIPLE}, up to {WIDEST}, "
                f"and {name}.weight has {[*shape_of(layer.weight)]}; set model.linear_dtype=null"
            )
    for layer in layers.values():
        set_float8(layer)


def count_float8(model: nn.Module) -> int:
    """How many linear layers are computed in 8 bits."""
    return sum(in_float8(module) for module in model.modules())


def _layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers of attention and of known MLPs, by name."""
    found = {}
    for name, module in model.named_modules():
        attends = name.rpartition(".")[-1] in ATTENTIONS
        for child, layer in module.named_children():
            if type(layer) is nn.Linear and (attends or child in linear_layers(module)):
                found[f"{name}.{child}"] = layer
    return found
