"""Arithmetic of a training step, counted exactly, and what part of the GPU's peak it reached.

Matrix products of weights take 2 operations per weight and token forward and 4 backward. Attention takes 4 operations
per visible (query, key) pair, query head and head dimension forward (q k^T and p v) and twice that backward. Masked
pairs are not counted and neither is recomputation, so this is causal MFU: what the model needed, over what the GPUs
could have done.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ringflash.mask import IntervalMask
from ringflash.models import head_dim

# Dense bf16 tensor-core peak, FLOP/s, by what the device's name contains (vendor datasheets, no sparsity).
PEAKS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12,
    "B200": 2250e12, "B100": 1750e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
}  # fmt: skip


def matmul_parameters(model: PreTrainedModel) -> int:
    """Weights that every token is multiplied with: all matrices, less an embedding that is only looked up.

    Of stacked experts, [experts, in, out], each token meets num_experts_per_tok.
    """
    experts = getattr(model.config, "num_local_experts", 1)
    met = getattr(model.config, "num_experts_per_tok", 1)
    total = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    total += sum(p.numel() * met // experts for p in model.parameters() if p.dim() == 3)
    embedding = cast(nn.Embedding, model.get_input_embeddings()).weight
    tied = cast(nn.Linear, model.get_output_embeddings()).weight is embedding
    return total if tied else total - embedding.numel()


def windows_of_layers(config: PreTrainedConfig) -> list[tuple[int | None, int]]:
    """The sliding windows that layers have (None: they have none), and how many layers have each."""
    windowed = _windowed_layers(config)
    found = [(None, config.num_hidden_layers - windowed), (config.sliding_window if windowed else None, windowed)]
    return [(window, layers) for window, layers in found if layers]


def narrowest(config: PreTrainedConfig, mask: IntervalMask) -> IntervalMask:
    """The mask that all layers share: with the window, where every layer has one."""
    return _in_window(config, mask) if _windowed_layers(config) == config.num_hidden_layers else mask


def _windowed_layers(config: PreTrainedConfig) -> int:
    if config.model_type in ("mistral", "phi3"):  # one window for all layers, or none
        return config.num_hidden_layers if config.sliding_window else 0
    return (getattr(config, "layer_types", None) or []).count("sliding_attention")


def _in_window(config: PreTrainedConfig, mask: IntervalMask) -> IntervalMask:
    return mask & IntervalMask.window(mask.queries, config.sliding_window - 1)


def step_flops(config: PreTrainedConfig, weights: int, tokens: int, pairs: float) -> float:
    """Operations of a step: `weights` as matmul_parameters counts them; visible pairs, summed over layers."""
    return 6.0 * weights * tokens + 12.0 * pairs * config.num_attention_heads * head_dim(config)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
