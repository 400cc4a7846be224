"""FLOPs of a training step, counted exactly, for model FLOPs utilisation (MFU).

Matrix products of weights take 2 operations per weight and token forward and 4 backward. Attention takes 4 operations
per visible (query, key) pair, query head and head dimension forward (q k^T and p v) and twice that backward. Masked
pairs are not counted and neither is recomputation, so this is causal MFU: the operations that the model needs, divided
by the peak of the GPUs.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ringflash.models import experts_of, heads_of


def matmul_parameters(model: PreTrainedModel) -> int:
    """Weights that every token is multiplied with: all matrices except an embedding that is only looked up.

    Of stacked experts, [experts, in, out], each token is multiplied with those that it is routed to.
    """
    experts, active = experts_of(model.config)
    shapes = [shape_of(p) for p in model.parameters()]
    total = sum(shape.numel() for shape in shapes if len(shape) == 2)
    total += sum(shape.numel() * active // experts for shape in shapes if len(shape) == 3)
    embedding = cast(nn.Embedding, model.get_input_embeddings()).weight
    tied = cast(nn.Linear, model.get_output_embeddings()).weight is embedding
    return total if tied else total - shape_of(embedding).numel()


def shape_of(parameter: Tensor) -> torch.Size:
    """A parameter's shape, also where ZeRO 3 has divided it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def step_flops(config: PreTrainedConfig, weights: int, tokens: int, pairs: float) -> float:
    """Operations of a step: `weights` as matmul_parameters counts them; visible pairs, summed over layers."""
    return 6.0 * weights * tokens + 12.0 * pairs * config.num_attention_heads * heads_of(config).dim
