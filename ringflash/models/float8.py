"""The three products of a linear layer in 8 bits.

    y  = x W^T          rows of x, rows of W
    dx = dy W           rows of dy, columns of W
    dW = dy^T x         columns of dy, columns of x

Each operand is cast to e4m3 with one fp32 scale per row or column, max |x| / 448, so that no scale varies inside a
sum. Results have 16 bits. Tensor cores sum in fewer bits than fp32. For y and dx that is exact enough. The sums of dW
are over all tokens, and are added in fp32 outside: over 32768 tokens their error is then 1.3e-4 instead of 4.7e-3
(H200, 2026-12-01), beside 3.7e-2 of the casts.

Weights stay in 16 bits and are cast where they are used, so optimizer, checkpoints and exports do not change.

Products need a Hopper GPU. On the CPU, plain torch emulates them, for tests.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LINEAR_DTYPES = ("fp8",)
LARGEST = 448.0  # of e4m3
SMALLEST = 1e-30  # maximum that a scale is made for: above 0, for rows of zeros, and for a finite LARGEST / SMALLEST
MULTIPLE = 16  # what torch's product of 8-bit matrices needs of their sizes
FIRST_CUDA = (12, 9)
WIDEST = 32768  # elements of a row that a cast holds in registers


class Float8(NamedTuple):
    """A matrix of 8-bit values [rows, contraction], and its scales [rows, 1]."""

    values: Tensor
    scales: Tensor


class Operand:
    """A matrix x [M, K] of 16 bits that enters products in 8 bits. Each cast is made once, when it is needed."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @cached_property
    def rows(self) -> Float8:
        """By rows: values [M, K]."""
        if not self.x.is_cuda:
            return _cast(self.x)
        from ringflash.fused.float8 import cast_rows

        return Float8(*cast_rows(self.x))

    @cached_property
    def columns(self) -> Float8:
        """By columns: values [K, M], with zeros up to a multiple of 16 columns."""
        if not self.x.is_cuda:
            return _cast(nn.functional.pad(self.x.T, (0, -len(self.x) % MULTIPLE)))
        from ringflash.fused.float8 import cast_columns

        return Float8(*cast_columns(self.x))


def forward(x: Operand, weight: Operand, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """y. out: the tensor to write."""
    y = _product(x.rows, weight.rows, x.x.dtype, out)
    return y if bias is None else y.add_(bias)


def backward(dy: Operand, weight: Operand, out: Tensor | None = None, add: bool = False) -> Tensor:
    """dx. add: to what `out` has."""
    if add and out is not None:
        return out.add_(_product(dy.rows, weight.columns, dy.x.dtype))
    return _product(dy.rows, weight.columns, dy.x.dtype, out)


def weight_gradient(dy: Operand, x: Operand, dtype: torch.dtype) -> Tensor:
    """dW in `dtype`."""
    return _product(dy.columns, x.columns, dtype, fast=False)


def refusal(device: torch.device) -> str | None:
    """None, or why products in 8 bits cannot be computed on a device: the tail of "... needs ..."."""
    if device.type != "cuda":
        return None
    if (found := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"needs a Hopper GPU (sm_90), and this one is sm_{found[0]}{found[1]}"
    cuda = torch.version.cuda or "0.0"
    if tuple(int(x) for x in cuda.split(".")[:2]) < FIRST_CUDA:  # whose cuBLAS has no scales of rows
        return f"needs a torch built for CUDA {'.'.join(map(str, FIRST_CUDA))} or newer, and this one is for {cuda}"
    return None


def set_float8(layer: nn.Linear) -> None:
    """Compute a linear layer in 8 bits."""
    layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def in_float8(layer: nn.Module) -> bool:
    """Whether a linear layer is computed in 8 bits."""
    return getattr(vars(layer).get("forward"), "func", None) is _forward


def _forward(layer: Any, x: Tensor) -> Tensor:
    """y [..., out] of x [..., in]."""
    y = _Linear.apply(x.flatten(0, -2), layer.weight, layer.bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _cast(x: Tensor) -> Float8:
    """x by rows, in plain torch."""
    largest = nn.functional.pad(x.abs().float(), (0, 1), value=SMALLEST).amax(1, keepdim=True)
    factor = torch.full_like(largest, LARGEST) / largest  # LARGEST / largest would be LARGEST times the rounded inverse
    return Float8((x.float() * factor).to(torch.float8_e4m3fn), largest / LARGEST)


def _product(a: Float8, b: Float8, dtype: torch.dtype, out: Tensor | None = None, fast: bool = True) -> Tensor:
    """a b^T [rows of a, rows of b] in `dtype`. fast: sum in the tensor cores alone, in less than fp32."""
    if a.values.is_cuda:
        scales = {"scale_a": a.scales, "scale_b": b.scales.T}
        more = {} if out is None else {"out": out}
        return torch._scaled_mm(a.values, b.values.T, **scales, out_dtype=dtype, use_fast_accum=fast, **more)
    y = (a.values.float() @ b.values.float().T * a.scales * b.scales.T).to(dtype)
    return y if out is None else out.copy_(y)


class _Linear(torch.autograd.Function):
    """y of rows x, with the gradients of x, W and the bias."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.save_for_backward(x, weight)
        return forward(Operand(x), Operand(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        gradient = Operand(dy)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx = backward(gradient, Operand(weight)) if of_x else None
        dw = weight_gradient(gradient, Operand(x), weight.dtype) if of_weight else None
        return dx, dw, dy.sum(0) if of_bias else None
