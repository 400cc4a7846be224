"""RMSNorm, fused with the addition to the residual stream before it.

    h = x + residual            rounded to x's dtype, as the model keeps it
    y = h r (offset + w)        r = 1 / sqrt(mean(h^2) + eps); offset 1 where weights are stored as w - 1 (Gemma)

Backward, with g = dy (offset + w):

    dx = dresidual = dh + r (g - h r mean(g h r))
    dw = sum over rows of dy h r

Each program of the backward processes many rows and sums its part of dw in registers; the parts are then added. A
frozen weight gets no dw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringflash.fused.launch import dense, programs_for, tile_of


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(h, y): the residual stream and its norm, both of x's shape and dtype.

    x, residual [..., H]; weight [H]; offset is added to the weight. h is x + residual, or x itself without one: use it
    as the residual stream, so that its gradient is added inside the backward's kernel. dtypes are fp16, bf16 or fp32;
    sums are in fp32. Raises ValueError if H is above `launch.LARGEST_ROW`.
    """
    return _RMSNorm.apply(x, weight, residual, eps, offset)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float):
        x, residual = x.contiguous(), dense(residual)
        h = x.view_as(x) if residual is None else torch.empty_like(x)
        y = torch.empty_like(x)
        width = x.shape[-1]
        count = x.numel() // width
        inverse = torch.empty(count, dtype=torch.float32, device=x.device)
        rows, columns, warps = tile_of(width)
        _forward[(triton.cdiv(count, rows),)](
            x, residual, weight, h, y, inverse, count, width, eps, offset,
            ADDS=residual is not None, ROWS=rows, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
        ctx.save_for_backward(h, weight, inverse)
        ctx.offset, ctx.adds = offset, residual is not None
        ctx.set_materialize_grads(False)
        return h, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor | None, dy: Tensor | None):
        h, weight, inverse = ctx.saved_tensors
        if dy is None:
            return dh, None, dh if ctx.adds else None, None, None
        dh, dy = dense(dh), dy.contiguous()
        dx = torch.empty_like(h)
        rows, columns, warps = tile_of(h.shape[-1])
        tiles = triton.cdiv(len(inverse), rows)
        programs = programs_for(tiles, h.device)
        trained = ctx.needs_input_grad[1]
        parts = torch.empty(programs, h.shape[-1], dtype=torch.float32, device=h.device) if trained else None
        _backward[(programs,)](
            h, weight, inverse, dh, dy, dx, parts, len(inverse), h.shape[-1], ctx.offset, tiles,
            ADDS=dh is not None, TRAINED=trained, ROWS=rows, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
        return dx, None if parts is None else parts.sum(0).to(weight.dtype), dx if ctx.adds else None, None, None


@triton.jit
def _forward(
    x, residual, weight, h, y, inverse, count, width, eps, offset,
    ADDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    a = tl.load(x + at, inside, 0.0).to(tl.float32)
    if ADDS:
        a = (a + tl.load(residual + at, inside, 0.0).to(tl.float32)).to(h.dtype.element_ty)
        tl.store(h + at, a, inside)
        a = a.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(a * a, 1) / width + eps)
    w = offset + tl.load(weight + column, column < width, 0.0).to(tl.float32)
    tl.store(inverse + row, r, row < count)
    tl.store(y + at, (a * r[:, None] * w[None, :]).to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    h, weight, inverse, dh, dy, dx, parts, count, width, offset, tiles,
    ADDS: tl.constexpr, TRAINED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Every programs-th tile of rows, and this program's part of dw."""
    column = tl.arange(0, COLUMNS)
    w = offset + tl.load(weight + column, column < width, 0.0).to(tl.float32)
    dw = tl.zeros([COLUMNS], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < count)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        r = tl.load(inverse + row, row < count, 0.0)
        n = tl.load(h + at, inside, 0.0).to(tl.float32) * r[:, None]
        g = tl.load(dy + at, inside, 0.0).to(tl.float32)
        if TRAINED:
            dw += tl.sum(g * n, 0)
        g = g * w[None, :]
        d = r[:, None] * (g - n * (tl.sum(g * n, 1) / width)[:, None])
        if ADDS:
            d += tl.load(dh + at, inside, 0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), inside)
    if TRAINED:
        tl.store(parts + tl.program_id(0) * width + column, dw, column < width)
