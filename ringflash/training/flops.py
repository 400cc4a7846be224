"""FLOPs of a training step, counted exactly, for model FLOPs utilisation (MFU).

Matrix products of weights take 2 operations per weight and token forward and 4 backward. With LoRA the model's own
weights are frozen and take 2 backward: their own gradients are not computed. (Below the first adapters the input's are
not computed either, which is not subtracted.) Attention takes 4 operations per visible (query, key) pair, query head
and head dimension forward (q k^T and p v) and twice that backward. Masked pairs are not counted and neither is
recomputation, so this is causal MFU: the operations that the model needs, divided by the peak of the GPUs.

Linear attention takes operations per token, value head and element of the head's state. With the delta rule these are 6
forward: a key and a query read the state, and an update writes it. In Mamba-2 layers no key reads it, so they are 4.
The backward takes twice as many. Kernels that work on chunks of tokens do more, which is not counted.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ringflash.models.configuration import experts_of
from ringflash.models.layers import state_heads, state_layers
from ringflash.models.quantized import shape_of
from ringflash.ring.cost import Heads


def matmul_parameters(model: PreTrainedModel, frozen: bool = False) -> int:
    """Weights that every token is multiplied with: all matrices except embeddings that are only looked up.

    Of stacked experts, [experts, in, out], each token is multiplied with those that it is routed to. Their biases are
    [experts, out], which is no matrix. A convolution over tokens has [channels, 1, tokens]. frozen: those that are not
    trained alone.
    """
    experts, active = experts_of(model.config)
    matrices = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    shapes = [shape_of(p) for p in matrices if not (frozen and p.requires_grad)]
    total = sum(shape.numel() for shape in shapes if len(shape) == 2)
    for shape in (shape for shape in shapes if len(shape) == 3):
        total += shape.numel() if shape[1] == 1 else shape.numel() * active // experts
    head = cast(nn.Linear, model.get_output_embeddings()).weight  # which may be tied to an embedding
    looked_up = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    counted = [weight for weight in looked_up if weight is not head and not (frozen and weight.requires_grad)]
    return total - sum(shape_of(weight).numel() for weight in counted)


def attention_flops(pairs: float, heads: Heads) -> float:
    """Operations of a step's attention on visible pairs, in one layer with these heads."""
    return 6.0 * pairs * heads.products


def state_flops(config: PreTrainedConfig, tokens: float) -> float:
    """Operations of a step's linear attention on tokens, in all layers of a model; 0 without any."""
    if (heads := state_heads(config)) is None:
        return 0.0
    return 3.0 * heads.operations * state_layers(config) * tokens * heads.value * heads.dim * heads.value_dim


def step_flops(weights: int, tokens: int, attention: float, frozen: int = 0, reference: bool = False) -> float:
    """Operations of a step: weights, and of these those frozen, as matmul_parameters counts them; attention's, also
    linear, of all layers. reference: whether a forward of the frozen weights alone is added, as in DPO."""
    added = 2.0 * frozen * tokens + attention / 3 if reference else 0.0
    return (6.0 * weights - 2.0 * frozen) * tokens + attention + added
