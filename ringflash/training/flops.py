"""FLOPs of a training step, counted exactly, for model FLOPs utilisation (MFU).

Matrix products of weights take 2 operations per weight and token forward and 4 backward. Frozen weights take 2
backward: their own gradients are not computed. Layers below the first one that trains run no backward at all. (In that
layer, all inputs are taken to need gradients.) Attention takes 4 operations per visible (query, key) pair, query head
and head dimension forward (q k^T and p v) and twice that backward. Masked pairs are not counted and neither is
recomputation, so this is causal MFU: the operations that the model needs, divided by the peak of the GPUs.

Linear attention takes operations per token, value head and element of the head's state. With the delta rule these are 6
forward: a key and a query read the state, and an update writes it. In Mamba-2 layers no key reads it, so they are 4.
The backward takes twice as many. Kernels that work on chunks of tokens do more, which is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ringflash.models.configuration import experts_of
from ringflash.models.freezing import forward_only_layers, layers_of
from ringflash.models.layers import state_heads, state_layers
from ringflash.models.lora import expert_adapters
from ringflash.models.quantized import shape_of
from ringflash.ring.cost import Heads

BACKWARD = 2 / 3  # of a layer's operations, where weights are trained


def matmul_parameters(model: PreTrainedModel, frozen: bool = False) -> int:
    """Weights that every token is multiplied with: all matrices except embeddings that are only looked up.

    Of stacked experts, [experts, in, out], and of their adapters, [experts x rank, in] and [out, rank x experts], each
    token is multiplied with those that it is routed to. Their biases are [experts, out], which is no matrix. A
    convolution over tokens has [channels, 1, tokens]. frozen: those that are not trained alone.
    """
    named = (x for x in model.named_parameters() if not (frozen and x[1].requires_grad))
    total = _multiplied(model.config, named, expert_adapters(model))
    head = cast(nn.Linear, model.get_output_embeddings()).weight  # which may be tied to an embedding
    looked_up = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    counted = [weight for weight in looked_up if weight is not head and not (frozen and weight.requires_grad)]
    return total - sum(shape_of(weight).numel() for weight in counted)


def forward_only_parameters(model: PreTrainedModel) -> int:
    """Those of `matmul_parameters` in layers that run no backward."""
    layers = layers_of(model)[: forward_only_layers(model)]
    return sum(_multiplied(model.config, layer.named_parameters()) for layer in layers)


def _multiplied(
    config: PreTrainedConfig, named: Iterable[tuple[str, Tensor]], of_experts: Set[str] = frozenset()
) -> int:
    """The elements of matrices by which a token is multiplied. of_experts: names of the adapters of experts."""
    experts, active = experts_of(config)
    total = 0
    for name, shape in ((name, shape_of(p)) for name, p in named if not name.endswith("bias")):
        if len(shape) in (2, 3):
            routed = name in of_experts or (len(shape) == 3 and shape[1] > 1)
            total += shape.numel() * active // experts if routed else shape.numel()
    return total


def attention_flops(pairs: float, heads: Heads) -> float:
    """Operations of a step's attention on visible pairs, in one layer with these heads."""
    return 6.0 * pairs * heads.products


def state_flops(config: PreTrainedConfig, tokens: float, forward_only: int = 0) -> float:
    """Operations of a step's linear attention on tokens, in all layers of a model; 0 without any.

    forward_only: first layers that run no backward.
    """
    if (heads := state_heads(config)) is None:
        return 0.0
    layers = state_layers(config) - BACKWARD * state_layers(config, forward_only)
    return 3.0 * heads.operations * layers * tokens * heads.value * heads.dim * heads.value_dim


def step_flops(
    weights: int, tokens: int, attention: float, frozen: int = 0, reference: bool = False, forward_only: int = 0
) -> float:
    """Operations of a step: weights, of these those frozen, and of these those without a backward, as counted above;
    attention's, also linear, of all layers. reference: whether a forward of the frozen weights alone is added, as in
    DPO."""
    added = 2.0 * frozen * tokens + attention / 3 if reference else 0.0
    return (6.0 * weights - 2.0 * frozen - 2.0 * forward_only) * tokens + attention + added
