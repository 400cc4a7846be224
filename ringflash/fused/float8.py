"""Casts of matrices to 8-bit floats (e4m3), with one fp32 scale per row or column: max |x| / 448.

Tensor cores of sm_90 read both operands of an 8-bit product along the contraction, so a cast by columns also
transposes. A cast by rows reads a matrix once, and a cast by columns twice. Finding the maxima of columns during a cast
by rows gained nothing: 1870 GB/s instead of 3075 for that cast (32768 x 14336, H200, 2026-12-01).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.fused.launch import programs_for, tile_of

MULTIPLE = 16  # of values per column: what a product of 8-bit matrices needs
TOKENS, COLUMNS = 128, 128  # of a tile that is transposed: 16 KiB of 8-bit values in shared memory


def cast_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values [M, K] and scales [M, 1] of x [M, K], by rows."""
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    rows, columns, warps = tile_of(x.shape[1])
    if len(x):
        grid = (triton.cdiv(len(x), rows),)
        _rows[grid](x, values, scales, len(x), x.shape[1], ROWS=rows, COLUMNS=columns, num_warps=warps)
    return values, scales


def cast_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values [K, M] and scales [K, 1] of x [M, K], by columns. M is rounded up to a multiple of 16, with zeros."""
    x = x.contiguous()
    count, width = x.shape
    tokens = triton.cdiv(count, MULTIPLE) * MULTIPLE
    values = torch.empty(width, tokens, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.ones(width, 1, dtype=torch.float32, device=x.device)
    tiles, across = triton.cdiv(tokens, TOKENS), triton.cdiv(width, COLUMNS)
    if not tiles:
        return values, scales
    maxima = torch.zeros(width, dtype=torch.float32, device=x.device)
    _maxima[(across, programs_for(tiles, x.device, across))](
        x, maxima, count, width, tiles, TOKENS=TOKENS, COLUMNS=COLUMNS, num_warps=8
    )
    _columns[(across, tiles)](
        x, maxima, values, scales, count, width, tokens, TOKENS=TOKENS, COLUMNS=COLUMNS, num_warps=8
    )
    return values, scales


@triton.jit
def _floor(most):
    """The largest value that a scale is made for; above 0, for a row of zeros, and for 448 / most to be finite."""
    return tl.maximum(most, 1e-30)


@triton.jit
def _rows(x, values, scales, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile of rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    a = tl.load(x + at, inside, 0.0).to(tl.float32)
    largest = _floor(tl.max(tl.abs(a), 1))
    tl.store(values + at, (a * tl.div_rn(448.0, largest)[:, None]).to(values.dtype.element_ty), inside)
    tl.store(scales + row, tl.div_rn(largest, 448.0), row < count)


@triton.jit
def _maxima(x, maxima, count, width, tiles, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """The maxima of some columns, over every programs-th tile of tokens."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    most = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        row = (tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        inside = (row < count)[:, None] & (column < width)[None, :]
        a = tl.load(x + row[:, None] * width + column[None, :], inside, 0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(a))
    tl.atomic_max(maxima + column, tl.max(most, 0), column < width)


@triton.jit
def _columns(
    x, maxima, values, scales, count, width, tokens, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One tile, transposed."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = (row < count)[:, None] & (column < width)[None, :]
    largest = _floor(tl.load(maxima + column, column < width, 0.0))
    a = tl.load(x + row[:, None] * width + column[None, :], inside, 0.0).to(tl.float32)
    small = tl.trans((a * tl.div_rn(448.0, largest)[None, :]).to(values.dtype.element_ty))
    at = column.to(tl.int64)[:, None] * tokens + row[None, :]
    tl.store(values + at, small, (column < width)[:, None] & (row < tokens)[None, :])
    if tl.program_id(1) == 0:
        tl.store(scales + column, tl.div_rn(largest, 448.0), column < width)
