"""RMSNorm of x silu(z) within groups of channels, as at the end of Mamba-2 layers: gate, then norm.

    h = x silu(z)
    y = h r w        r = 1 / sqrt(mean(h^2) + eps), of each token and group

Backward, with g = dy w:

    dh = r (g - h r mean(g h r))
    dx = dh silu(z)        dz = dh x silu'(z)
    dw = sum over tokens of dy h r

h is not kept. Each program of the backward processes many tokens of one group and sums its part of dw in registers; the
parts are then added. A frozen weight gets no dw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringflash.fused.launch import programs_for, sigmoid, tile_of


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """The norm, of x's shape and dtype. x, gate [..., H]; weight [H]; `groups` equal groups of channels.

    dtypes are fp16, bf16 or fp32; sums are in fp32. Raises ValueError if H / groups is above `launch.LARGEST_ROW`.
    """
    return _GatedNorm.apply(x, gate, weight, eps, groups)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int):
        x, gate = x.contiguous(), gate.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1] // groups
        count = x.numel() // x.shape[-1]
        inverse = torch.empty(count, groups, dtype=torch.float32, device=x.device)
        rows, columns, warps = tile_of(width)
        _forward[(triton.cdiv(count, rows), groups)](
            x, gate, weight, y, inverse, count, width, eps, ROWS=rows, COLUMNS=columns, num_warps=warps
        )
        ctx.save_for_backward(x, gate, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, gate, weight, inverse = ctx.saved_tensors
        dy = dy.contiguous()
        dx, dgate = torch.empty_like(x), torch.empty_like(gate)
        count, groups = inverse.shape
        rows, columns, warps = tile_of(x.shape[-1] // groups)
        tiles = triton.cdiv(count, rows)
        programs = triton.cdiv(programs_for(tiles * groups, x.device), groups)
        trained = ctx.needs_input_grad[2]
        parts = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device) if trained else None
        _backward[(programs, groups)](
            x, gate, weight, inverse, dy, dx, dgate, parts, count, x.shape[-1] // groups, tiles,
            TRAINED=trained, ROWS=rows, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
        return dx, dgate, None if parts is None else parts.sum(0).to(weight.dtype), None, None


@triton.jit
def _forward(x, gate, weight, y, inverse, count, width, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile of tokens, of one group."""
    group, groups = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < width)[None, :]
    at = (row * groups + group)[:, None] * width + column[None, :]
    z = tl.load(gate + at, inside, 0.0).to(tl.float32)
    h = tl.load(x + at, inside, 0.0).to(tl.float32) * z * sigmoid(z)
    r = 1.0 / tl.sqrt(tl.sum(h * h, 1) / width + eps)
    w = tl.load(weight + group * width + column, column < width, 0.0).to(tl.float32)
    tl.store(inverse + row * groups + group, r, row < count)
    tl.store(y + at, (h * r[:, None] * w[None, :]).to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    x, gate, weight, inverse, dy, dx, dgate, parts, count, width, tiles,
    TRAINED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Every programs-th tile of one group's tokens, and this program's part of dw."""
    group, groups = tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + group * width + column, column < width, 0.0).to(tl.float32)
    dw = tl.zeros([COLUMNS], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < count)[:, None] & (column < width)[None, :]
        at = (row * groups + group)[:, None] * width + column[None, :]
        r = tl.load(inverse + row * groups + group, row < count, 0.0)[:, None]
        z = tl.load(gate + at, inside, 0.0).to(tl.float32)
        a = tl.load(x + at, inside, 0.0).to(tl.float32)
        g = tl.load(dy + at, inside, 0.0).to(tl.float32)
        s = sigmoid(z)
        n = a * z * s * r
        if TRAINED:
            dw += tl.sum(g * n, 0)
        g = g * w[None, :]
        dh = r * (g - n * (tl.sum(g * n, 1) / width)[:, None])
        tl.store(dx + at, (dh * z * s).to(dx.dtype.element_ty), inside)
        tl.store(dgate + at, (dh * a * s * (1.0 + z * (1.0 - s))).to(dgate.dtype.element_ty), inside)
    if TRAINED:
        tl.store(parts + (tl.program_id(0) * groups + group) * width + column, dw, column < width)
