"""act(gate) * up, the elementwise pass of a gated MLP (SwiGLU, GeGLU), and its backward.

The backward writes both gradients over gate and up, which nothing needs after it: two tensors of tokens x intermediate
size less at a step's peak of memory. A second backward through the same graph is refused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringflash.fused.launch import sigmoid

BLOCK = 2048
ACTIVATIONS = ("silu", "gelu_tanh")


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up, of their shape and dtype. activation: "silu", or "gelu_tanh", GELU by its tanh approximation.

    gate and up must be used by nothing else: the backward overwrites them. Raises ValueError for another activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation} is not one of {', '.join(ACTIVATIONS)}")
    return _Gated.apply(gate, up, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        grid = (triton.cdiv(out.numel(), BLOCK),)
        _forward[grid](gate, up, out, out.numel(), GELU=activation == "gelu_tanh", BLOCK=BLOCK, num_warps=8)
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.overwritten = activation, False
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        if ctx.overwritten:
            raise RuntimeError("a second backward through a fused MLP: its gate and up were overwritten by the first")
        gate, up = ctx.saved_tensors
        dout = dout.contiguous()
        grid = (triton.cdiv(gate.numel(), BLOCK),)
        _backward[grid](gate, up, dout, gate.numel(), GELU=ctx.activation == "gelu_tanh", BLOCK=BLOCK, num_warps=8)
        torch.autograd.graph.increment_version((gate, up))  # so that torch reports anyone else who kept them
        ctx.overwritten = True
        return gate, up, None


@triton.jit
def _activation(a, GELU: tl.constexpr):
    """act(a) and its derivative, fp32."""
    if GELU:  # a sigmoid(2 z), which is a (1 + tanh z) / 2
        k: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
        s = sigmoid(2.0 * k * (a + 0.044715 * a * a * a))
        slope = s + a * s * (1.0 - s) * 2.0 * k * (1.0 + 3.0 * 0.044715 * a * a)
    else:
        s = sigmoid(a)
        slope = s * (1.0 + a * (1.0 - s))
    return a * s, slope


@triton.jit
def _forward(gate, up, out, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """One block of elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + at, at < count, 0.0).to(tl.float32)
    b = tl.load(up + at, at < count, 0.0).to(tl.float32)
    value, _ = _activation(a, GELU)
    tl.store(out + at, (value * b).to(out.dtype.element_ty), at < count)


@triton.jit
def _backward(gate, up, dout, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """One block of elements, its gradients written over gate and up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + at, at < count, 0.0).to(tl.float32)
    b = tl.load(up + at, at < count, 0.0).to(tl.float32)
    d = tl.load(dout + at, at < count, 0.0).to(tl.float32)
    value, slope = _activation(a, GELU)
    tl.store(gate + at, (d * b * slope).to(gate.dtype.element_ty), at < count)
    tl.store(up + at, (d * value).to(up.dtype.element_ty), at < count)
