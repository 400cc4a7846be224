"""Rotary positions of queries or keys, fused with the RMSNorm of each head before them (Qwen 3).

With x the two halves (x1, x2) of a head's D dimensions, and c, s the cosines and sines of its token:

    n = x r (offset + w)          r = 1 / sqrt(mean(x^2) + eps); n = x where the model has no such norm
    y1 = n1 c1 - n2 s1
    y2 = n2 c2 + n1 s2

Backward: dn1 = dy1 c1 + dy2 s2, dn2 = dy2 c2 - dy1 s1, then as in `norm`. r is computed again instead of being kept. A
frozen weight gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringflash.fused.launch import TILE, programs_for


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 0.0, offset: float = 0.0
) -> Tensor:
    """Rotated heads, of x's shape and dtype, contiguous.

    x [B, S, heads, D], D even; cos, sin [B or 1, S, D], as transformers' rotary embedding gives them. weight [D]: each
    head is first normalised, as by `rms_norm`. Raises ValueError if D is odd, or if cos does not fit x.
    """
    return _Rotary.apply(x, cos, sin, weight, eps, offset)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, offset: float):
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        y = torch.empty_like(x)
        call = _call(x, cos, weight)
        _forward[(call.pop("tiles"),)](x, cos, sin, weight, y, eps=eps, offset=offset, **call)
        ctx.save_for_backward(None if weight is None else x, cos, sin, weight)
        ctx.eps, ctx.offset = eps, offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        dy = dy.contiguous()
        x, cos, sin, weight = ctx.saved_tensors
        dx = torch.empty_like(dy)
        call = _call(dy, cos, weight)
        programs = programs_for(call["tiles"], dy.device) if weight is not None else call["tiles"]
        trained, parts = ctx.needs_input_grad[3], None
        if trained:
            parts = torch.empty(programs, dy.shape[-1], dtype=torch.float32, device=dy.device)
        call |= {"eps": ctx.eps, "offset": ctx.offset, "TRAINED": trained}
        _backward[(programs,)](x, cos, sin, weight, dy, dx, parts, **call)
        dweight = None if parts is None or weight is None else parts.sum(0).to(weight.dtype)
        return dx, None, None, dweight, None, None


def _call(x: Tensor, cos: Tensor, weight: Tensor | None) -> dict[str, Any]:
    """The launch's numbers. A row is one head of one token."""
    batch, length, heads, dim = x.shape
    if dim % 2 or cos.shape[-1] != dim or cos.shape[-2] != length or cos.shape[0] not in (1, batch):
        raise ValueError(f"cos {[*cos.shape]} must be [{batch} or 1, {length}, {dim}], of an even head size")
    half = triton.next_power_of_2(dim // 2)
    rows = max(1, TILE // (2 * half))
    count = x.numel() // dim
    return {
        "count": count, "heads": heads, "tokens": cos.shape[0] * length, "half": dim // 2,
        "tiles": triton.cdiv(count, rows), "NORM": weight is not None, "ROWS": rows, "HALF": half, "num_warps": 4,
    }  # fmt: skip


@triton.jit
def _angles(cos, sin, token, column, inside, half):
    """c1, c2, s1, s2 of a tile's tokens."""
    at = token[:, None] * (2 * half) + column[None, :]
    c1, c2 = tl.load(cos + at, inside, 0.0), tl.load(cos + half + at, inside, 0.0)
    s1, s2 = tl.load(sin + at, inside, 0.0), tl.load(sin + half + at, inside, 0.0)
    return c1.to(tl.float32), c2.to(tl.float32), s1.to(tl.float32), s2.to(tl.float32)


@triton.jit
def _halves(x, at, inside, half):
    """Both halves of a tile's heads, fp32."""
    return tl.load(x + at, inside, 0.0).to(tl.float32), tl.load(x + half + at, inside, 0.0).to(tl.float32)


@triton.jit
def _inverse(x1, x2, half, eps):
    """1 / sqrt(mean(x^2) + eps) of each row."""
    return 1.0 / tl.sqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * half) + eps)


@triton.jit
def _weights(weight, offset, column, half):
    """offset + w, in halves."""
    w1 = tl.load(weight + column, column < half, 0.0).to(tl.float32)
    w2 = tl.load(weight + half + column, column < half, 0.0).to(tl.float32)
    return (offset + w1)[None, :], (offset + w2)[None, :]


@triton.jit
def _forward(
    x, cos, sin, weight, y, count, heads, tokens, half, eps, offset,
    NORM: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One tile of heads."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HALF)
    inside = (row < count)[:, None] & (column < half)[None, :]
    at = row[:, None] * (2 * half) + column[None, :]
    n1, n2 = _halves(x, at, inside, half)
    if NORM:
        r = _inverse(n1, n2, half, eps)[:, None]
        w1, w2 = _weights(weight, offset, column, half)
        n1, n2 = n1 * r * w1, n2 * r * w2
    c1, c2, s1, s2 = _angles(cos, sin, (row // heads) % tokens, column, inside, half)
    tl.store(y + at, (n1 * c1 - n2 * s1).to(y.dtype.element_ty), inside)
    tl.store(y + half + at, (n2 * c2 + n1 * s2).to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    x, cos, sin, weight, dy, dx, parts, count, heads, tokens, half, eps, offset, tiles,
    NORM: tl.constexpr, TRAINED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Every programs-th tile of heads, and this program's part of dw."""
    column = tl.arange(0, HALF)
    dw1, dw2 = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < count)[:, None] & (column < half)[None, :]
        at = row[:, None] * (2 * half) + column[None, :]
        g1, g2 = _halves(dy, at, inside, half)
        c1, c2, s1, s2 = _angles(cos, sin, (row // heads) % tokens, column, inside, half)
        d1, d2 = g1 * c1 + g2 * s2, g2 * c2 - g1 * s1
        if NORM:
            n1, n2 = _halves(x, at, inside, half)
            r = _inverse(n1, n2, half, eps)[:, None]
            n1, n2 = n1 * r, n2 * r
            if TRAINED:
                dw1 += tl.sum(d1 * n1, 0)
                dw2 += tl.sum(d2 * n2, 0)
            w1, w2 = _weights(weight, offset, column, half)
            d1, d2 = d1 * w1, d2 * w2
            mean = ((tl.sum(d1 * n1, 1) + tl.sum(d2 * n2, 1)) / (2 * half))[:, None]
            d1, d2 = r * (d1 - n1 * mean), r * (d2 - n2 * mean)
        tl.store(dx + at, d1.to(dx.dtype.element_ty), inside)
        tl.store(dx + half + at, d2.to(dx.dtype.element_ty), inside)
    if TRAINED:
        part = parts + tl.program_id(0) * (2 * half) + column
        tl.store(part, dw1, column < half)
        tl.store(part + half, dw2, column < half)
