"""QLoRA's base: a model's linear layers in 4 bits per weight, by bitsandbytes; adapters are trained on them.

    W ~ absmax_b NF4[code]         blocks b of 64 weights; the values absmax_b have 8 bits, in blocks of 256

A layer's weights are dequantized to model.dtype where they are used, and dropped. Embeddings, norms and lm_head stay as
they are loaded. bitsandbytes would repack weights for some CPUs in evaluation, and lose their gradient in the training
that follows; `without_repacking` turns that off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

KINDS = ("nf4",)
BYTES = (4 + 8 / 64 + 32 / 64 / 256) / 8  # per weight
UNCALLED = ("correction_coefs",)  # linear layers whose weight alone is read: Gemma 3n's; adapters would do nothing
_WHOLE = ("lm_head", *UNCALLED)  # ends of names of linear layers that are not quantized


def quantization(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers loads a model in 4 bits by. dtype: of activations."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*_WHOLE],
    )


def without_repacking(model: nn.Module) -> None:
    """Keep the layout of 4-bit weights in evaluation, on every CPU."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def weight_of(layer: Any) -> Tensor | None:
    """The weight [out, in] of a linear layer, dequantized if it has 4 bits; None for a layer of another kind."""
    if type(layer) is nn.Linear:
        return layer.weight
    if not isinstance(layer, nn.Linear) or (state := getattr(layer.weight, "quant_state", None)) is None:
        return None
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state)


def shape_of(parameter: Tensor) -> torch.Size:
    """A parameter's shape, also in 4 bits, and where ZeRO 3 has divided it."""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_shape", parameter.shape) if state is None else torch.Size(state.shape)


def quantizable(model: nn.Module) -> int:
    """How many weights of a model are quantized when it is loaded in 4 bits."""
    linear = [x for name, x in model.named_modules() if isinstance(x, nn.Linear) and not name.endswith(_WHOLE)]
    return sum(x.weight.numel() for x in linear if not x.weight.requires_grad)
