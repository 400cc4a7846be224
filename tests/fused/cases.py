"""Fused passes beside what they replace: the arithmetic of transformers' layers, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def norm(x: Tensor, weight: Tensor, residual: Tensor | None, offset: float, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(h, y) as LlamaRMSNorm (offset 0) or Gemma2RMSNorm (offset 1) computes them after an addition."""
    h = x if residual is None else residual + x
    wide = h if h.dtype == torch.float64 else h.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return h, (y * (offset + weight.to(wide.dtype))).to(h.dtype)
    return h, weight * y.to(h.dtype)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    """x silu(gate), normalised within groups of channels as Zamba2RMSNormGated does."""
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    h = (x.to(wide) * functional.silu(gate.to(wide))).unflatten(-1, (groups, -1))
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.flatten(-2).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """Heads [B, S, heads, D] as Qwen3Attention normalises them and turns them by apply_rotary_pos_emb."""
    if weight is not None:
        _, x = norm(x, weight, None, 0.0, eps)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos.unsqueeze(2).to(x.dtype) + turned * sin.unsqueeze(2).to(x.dtype)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, as LlamaMLP and Gemma2MLP compute it."""
    act = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    return act * up


def cross_entropy(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Losses [N], 0 where the label is -100."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return functional.cross_entropy(z, labels, reduction="none", ignore_index=-100)


def gradients(function, inputs: list[Tensor], dtype: torch.dtype, seed: int = 5) -> list[Tensor]:
    """Outputs and gradients, as float64, of function(*inputs) in `dtype`, for the same incoming gradients in any."""
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    # a copy, since a fused backward may write over its inputs, and a leaf's memory is the test's
    outputs = function(*(x * 1 for x in leaves))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    draws = [torch.randn(y.shape, generator=generator, device=y.device).to(inputs[0].dtype) for y in outputs]
    found = torch.autograd.grad(outputs, leaves, [d.to(y.dtype) for d, y in zip(draws, outputs, strict=True)])
    return [x.detach().double() for x in (*outputs, *found)]


def excess(fused, plain, inputs: list[Tensor]) -> float:
    """The worst error of `fused` against float64, over what the rule allows: 1 or less passes.

    fp32: 1e-5 in relative norm. 16 bits: twice the error of `plain` in the same dtype, plus 1e-4.
    """
    dtype = inputs[0].dtype
    exact = gradients(plain, inputs, torch.float64)
    mine = gradients(fused, inputs, dtype)
    if dtype == torch.float32:
        return max(float((m - e).norm() / e.norm()) / 1e-5 for m, e in zip(mine, exact, strict=True))
    theirs = gradients(plain, inputs, dtype)
    return max(
        float((m - e).norm() / e.norm()) / (2 * float((t - e).norm() / e.norm()) + 1e-4)
        for m, t, e in zip(mine, theirs, exact, strict=True)
    )
