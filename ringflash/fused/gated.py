"""act(gate) * up, the elementwise pass of a gated MLP (SwiGLU, GeGLU), and its backward.

The backward overwrites gate and up with their gradients. It also overwrites the gradient of act(gate) * up with that
product, which later products need again. So it needs three tensors of tokens x intermediate size, and the forward two
or three.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.fused.launch import sigmoid

BLOCK = 2048
ACTIVATIONS = ("silu", "gelu_tanh")


def gated(gate: Tensor, up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """act(gate) * up, in their shape and dtype, all contiguous. out: the tensor to write, which may be gate or up.

    activation: "silu", or "gelu_tanh" for GELU in its tanh approximation. Raises ValueError for another activation.
    """
    out = torch.empty_like(gate) if out is None else out
    _check(activation, gate, up, out)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    if out.numel():
        _forward[grid](gate, up, out, out.numel(), GELU=activation == "gelu_tanh", BLOCK=BLOCK, num_warps=8)
    return out


def gated_backward_(gate: Tensor, up: Tensor, dout: Tensor, activation: str) -> None:
    """The backward, in place: gate and up become their gradients, and dout becomes act(gate) * up."""
    _check(activation, gate, up, dout)
    grid = (triton.cdiv(gate.numel(), BLOCK),)
    if gate.numel():
        _backward[grid](gate, up, dout, gate.numel(), GELU=activation == "gelu_tanh", BLOCK=BLOCK, num_warps=8)


def _check(activation: str, *tensors: Tensor) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation} is not one of {', '.join(ACTIVATIONS)}")
    if not all(x.is_contiguous() for x in tensors):
        raise ValueError(f"a gated pass needs contiguous tensors, got strides {[x.stride() for x in tensors]}")


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
    """One block of elements, in place."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + at, at < count, 0.0).to(tl.float32)
    b = tl.load(up + at, at < count, 0.0).to(tl.float32)
    d = tl.load(dout + at, at < count, 0.0).to(tl.float32)
    value, slope = _activation(a, GELU)
    tl.store(gate + at, (d * b * slope).to(gate.dtype.element_ty), at < count)
    tl.store(up + at, (d * value).to(up.dtype.element_ty), at < count)
    tl.store(dout + at, (value * b).to(dout.dtype.element_ty), at < count)
