"""Products of linear layers with LoRA adapters, and their gradients. An adapted layer becomes one function of them.

    t  = scale x A^T            [tokens, rank]
    y  = t B^T + bias + x W^T
    u  = scale dy B             [tokens, rank]
    dx = u A + dy W             dA = u^T x, dB = dy^T t

The adapter's product is written first. The product with W then adds to it in its epilogue, so that the sum takes no
pass over memory of its own. y is rounded once after the sum, and the adapter's product once before it.

W and the bias are frozen: they get no gradient here. W is used directly, so for ZeRO 3 an adapted layer must be a leaf
module (`mlp.leaf_modules` lists them). Weights of 4 bits are dequantized again in the backward instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ringflash.models import float8
from ringflash.models.float8 import Operand
from ringflash.models.lora import adapted
from ringflash.models.quantized import weight_of


class Parts(NamedTuple):
    """A linear layer's tensors, those of an adapter None if there is none: y = W x + bias + scale B (A x).

    The weight is an Operand if products are in 8 bits; there is no adapter then.
    """

    weight: Any
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 0.0


def parts_of(layer: Any) -> Parts | None:
    """The parts of a linear layer; None for a layer of another kind, and for an adapter that is merged or has dropout.

    A disabled adapter is none.
    """
    names = [name for name in getattr(layer, "active_adapters", []) if name in getattr(layer, "lora_A", {})]
    if not names:
        return None if (weight := weight_of(layer)) is None else Parts(weight, layer.bias)
    a, b, dropout = (part[names[0]] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    in_use = len(names) == 1 and not layer.merged
    if not in_use or layer.lora_variant or b.bias is not None or type(dropout) is nn.Dropout:
        return None
    if (weight := weight_of(layer.base_layer)) is None:
        return None
    if layer.disable_adapters:
        return Parts(weight, layer.base_layer.bias)
    return Parts(weight, layer.base_layer.bias, a.weight, b.weight, layer.scaling[names[0]])


def reduced(x: Any, parts: Parts) -> Tensor | None:
    """t of x; None without an adapter."""
    return None if parts.a is None else _scaled(x, parts.a.T, parts.scale)


def reduced_gradient(dy: Any, parts: Parts) -> Tensor | None:
    """u of dy; None without an adapter."""
    return None if parts.b is None else _scaled(dy, parts.b, parts.scale)


def product(x: Tensor | Operand, t: Tensor | None, parts: Parts, out: Tensor | None = None) -> Tensor:
    """y. t: `reduced` of x."""
    weight, bias, _, b, _ = parts
    if isinstance(x, Operand):
        return float8.forward(x, weight, bias, out)
    first, factor = (x, weight) if t is None or b is None else (t, b)
    y = torch.mm(first, factor.T, out=out) if bias is None else torch.addmm(bias, first, factor.T, out=out)
    return y if t is None else y.addmm_(x, weight.T)


def product_backward(
    dy: Tensor | Operand, u: Tensor | None, parts: Parts, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """dx. u: `reduced_gradient` of dy. add: to what `out` has."""
    if isinstance(dy, Operand):
        return float8.backward(dy, parts.weight, out, add)
    first, factor = (dy, parts.weight) if u is None or parts.a is None else (u, parts.a)
    dx = torch.addmm(out, first, factor, out=out) if add and out is not None else torch.mm(first, factor, out=out)
    return dx if u is None else dx.addmm_(dy, parts.weight)


def replace_adapted(model: nn.Module) -> None:
    """Compute a model's adapted layers with this file. Adapters with dropout stay with peft."""
    for layer in adapted(model).values():
        if parts_of(layer) is not None:
            layer.forward = partial(adapted_forward, layer)


def adapted_forward(layer: Any, x: Tensor) -> Tensor:
    """y [..., out] of x [..., in]."""
    if (parts := parts_of(layer)) is None:
        raise RuntimeError("a layer that is computed with its adapter had it merged or changed")
    rows = x.flatten(0, -2)
    if parts.a is None:
        y = product(rows, None, parts)
    else:
        y = _Adapted.apply(partial(weight_of, layer.base_layer), rows, *parts)
    return y.view(*x.shape[:-1], y.shape[-1])


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b, rounded once."""
    return a.new_empty(len(a), b.shape[1]).addmm_(a, b, beta=0, alpha=scale)


class _Adapted(torch.autograd.Function):
    """y of a layer, with the gradients of x, A and B."""

    @staticmethod
    def forward(ctx, weight_again: Callable[[], Tensor], x: Tensor, *tensors: Any) -> Tensor:
        parts = Parts(*tensors)
        t = reduced(x, parts)
        ctx.weight_again, ctx.scale = weight_again, parts.scale
        ctx.save_for_backward(x, t, parts.a, parts.b)
        return product(x, t, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, t, a, b = ctx.saved_tensors
        u, dx = _scaled(dy, b, ctx.scale), None
        if ctx.needs_input_grad[1]:
            dx = product_backward(dy, u, Parts(ctx.weight_again(), None, a, b, ctx.scale))
        return None, dx, None, None, u.T @ x, dy.T @ t, None
