"""Experts with LoRA adapters: the low-rank products of each expert's tokens are added to those of its weights.

    y_e = W_e x + scale B_e (A_e x) + bias_e        for the tokens x that are routed to expert e

peft adds scale B_e A_e to W_e instead, for all experts in each forward. That takes the memory of a layer's experts, and
so does the gradient of the sum, which is as much work as a forward. Here the tokens are sorted by expert, and every
product is one grouped matrix product:

    t  = scale x A_e^T            [pairs, rank]        pairs of a token and one of its experts, by expert
    y  = x W_e^T + t B_e^T
    u  = scale dy B_e
    dx = dy W_e + u A_e           dA_e = u^T x, dB_e = dy^T t

Weights are used directly, so for ZeRO 3 adapted experts must be a leaf module (`mlp.leaf_modules` lists them).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, pad

from ringflash.models.lora import adapted, factors, on_experts

ALIGNMENT = 8  # a grouped product needs rows of a multiple of 16 bytes on GPUs, so ranks are padded to it


class _Product(NamedTuple):
    """Weights of one product of all experts, as the model and peft hold them.

    weight: [experts, out, in], or [experts, in, out] if it is transposed; bias: [experts, out]; a: [experts x rank, in]
    and b: [out, rank x experts], or None without an adapter.
    """

    weight: Tensor
    bias: Tensor | None
    transposed: bool
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 0.0


def replace_experts(model: nn.Module) -> None:
    """Compute a model's adapted experts with this file."""
    for name, layer in adapted(model).items():
        if on_experts(layer) and not name.endswith(".base_layer"):  # peft wraps experts once for each adapted weight
            layer.forward = partial(experts_forward, layer)


def experts_forward(wrapper: Any, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """y [tokens, H] of x [tokens, H]. chosen: each token's experts, [tokens, active]; shares: their weights in y."""
    experts = wrapper.get_base_layer()
    if wrapper.disable_adapters:
        return experts(x, chosen, shares)
    up, down = _products(wrapper, experts)
    of_expert, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(len(up.weight), device=x.device)
    ends = torch.searchsorted(of_expert, numbers, right=True, out_int32=True)
    h = _product(x[order // chosen.shape[1]], up, of_expert, ends)
    y = _product(experts._apply_gate(h) if experts.has_gate else experts.act_fn(h), down, of_expert, ends)
    y = y * shares.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return y[back].view(*chosen.shape, -1).sum(1).to(x.dtype)


def _products(wrapper: Any, experts: Any) -> list[_Product]:
    """The products of up, or gate and up, and of down."""
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    while on_experts(wrapper):
        if wrapper.merged or wrapper.active_adapters != ["default"]:
            raise RuntimeError("experts that are computed with their adapters had them merged or changed")
        a, b = (part["default"].weight for part in (wrapper.lora_A, wrapper.lora_B))
        found[wrapper.parameter_name] = a, b, wrapper.scaling["default"]
        wrapper = wrapper.base_layer
    names = ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"
    biases = [getattr(experts, f"{name}_bias") if experts.has_bias else None for name in names]
    transposed = experts.is_transposed
    return [
        _Product(getattr(experts, name), bias, transposed, *found.get(name, ()))
        for name, bias in zip(names, biases, strict=True)
    ]


def _product(x: Tensor, product: _Product, of_expert: Tensor, ends: Tensor) -> Tensor:
    """[pairs, out] of x [pairs, in]. of_expert: the expert of each pair; ends: where each expert's pairs end."""
    weight, bias, transposed, a, b, scale = product
    y = _Grouped.apply(x, ends, transposed, scale, weight, a, b)
    return y if bias is None else y.add_(bias[of_expert])


class _Grouped(torch.autograd.Function):
    """y of the pairs of all experts, with the gradients of x, A and B.

    It saves the parameters themselves, whose data ZeRO 3 gathers again, and no views of them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, ends: Tensor, transposed: bool, scale: float, weight: Tensor, a: Any, b: Any) -> Tensor:
        y, t = grouped_mm(x, weight if transposed else weight.mT, offs=ends), None
        if a is not None:
            of_a, of_b = _aligned(a, b, len(weight))
            t = grouped_mm(x, of_a.mT, offs=ends).mul_(scale)
            y += grouped_mm(t, of_b.mT, offs=ends)
        ctx.transposed, ctx.scale = transposed, scale
        ctx.save_for_backward(x if t is not None else None, t, ends, weight, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, t, ends, weight, a, b = ctx.saved_tensors
        dy, dx = dy.contiguous(), None
        if ctx.needs_input_grad[0]:
            dx = grouped_mm(dy, weight.mT if ctx.transposed else weight, offs=ends)
        if a is None:
            return dx, *[None] * 6
        of_a, of_b = _aligned(a, b, len(weight))
        u = grouped_mm(dy, of_b, offs=ends).mul_(ctx.scale)
        if dx is not None:
            dx += grouped_mm(u, of_a, offs=ends)
        rank = len(a) // len(weight)
        da = grouped_mm(u.T, x, offs=ends)[:, :rank]
        db = grouped_mm(dy.T, t, offs=ends)[..., :rank]
        return dx, None, None, None, None, da.reshape(a.shape), db.permute(1, 2, 0).reshape(b.shape)


def _aligned(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A [experts, rank, in] and B [experts, out, rank], with ranks padded by zeros to a multiple of ALIGNMENT."""
    of_a, of_b = factors(a, b, experts)
    more = -of_a.shape[1] % ALIGNMENT
    return pad(of_a, (0, 0, 0, more)).contiguous(), pad(of_b, (0, more)).contiguous()
