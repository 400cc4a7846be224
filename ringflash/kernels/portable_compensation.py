"""Centered keys in Triton: `compensation.center` in two launches, and k - c in one launch per backward call.

`moments_kernel` computes the mean and the variance of each head's sampled rows. Every program of `center_kernel`
computes c from them and shifts lse; it reads no queries if c is 0 for a KV head. `subtract_kernel` writes k - c for the
keys that are seen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.intervals import Intervals
from ringflash.kernels.compensation import BITS, LARGEST, SAMPLED, SPREAD, least_share, sampling
from ringflash.kernels.portable_parts import interval_stride, warps_of_whole_rows

SHIFTED_ROWS = 128  # per program of center_kernel
# Per program of subtract_kernel, and written beyond the keys that are seen: no kernel's tile is longer.
KEYS = tl.constexpr(128)
DROPPED = tl.constexpr(24 - BITS)  # bits of fp32's mantissa that c drops
HALF = tl.constexpr(1 << (23 - BITS))  # of the last bit that it keeps


@triton.jit
def coarse(x):
    """x with BITS bits of its mantissa, rounded to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    bits += HALF - 1 + ((bits >> DROPPED) & 1)
    return ((bits >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["step_q", "count_q", "step_k", "count_k"])
def moments_kernel(
    q, q_stride_b, q_stride_s, q_stride_h, step_q, count_q,
    k, k_stride_b, k_stride_s, k_stride_h, step_k, count_k,
    moments, heads_kv,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of a head's sampled rows, as [2, D] of moments [B, Hkv + Hq, 2, D]; keys come first."""
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    if head < heads_kv:
        x = k + batch * k_stride_b + head.to(tl.int64) * k_stride_h
        stride = k_stride_s * step_k.to(tl.int64)
        count = count_k
    else:
        x = q + batch * q_stride_b + (head - heads_kv).to(tl.int64) * q_stride_h
        stride = q_stride_s * step_q.to(tl.int64)
        count = count_q
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    values = tl.load(x + rows[:, None] * stride + columns[None, :], inside, 0.0).to(tl.float32)
    mean = tl.sum(values, 0) / count
    deviation = tl.where(inside, values - mean[None, :], 0.0)
    moments += ((batch * tl.num_programs(0) + head) * 2 * D) + columns
    tl.store(moments, mean, columns < D)
    tl.store(moments + D, tl.sum(deviation * deviation, 0) / count, columns < D)


@triton.jit(do_not_specialize=["rows", "scale", "least", "largest_c"])
def center_kernel(
    q, q_stride_b, q_stride_s, q_stride_h,
    lse, lse_stride_b, lse_stride_h,
    moments, center, result, rows, heads_kv, scale, least, largest_c, most,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """c of one KV head, and BLOCK rows of lse - scale q . c for each of its query heads.

    least: the fraction of the variance that the mean's square must exceed. most: the largest variance of the scores of
    centered keys.
    """
    head_kv = tl.program_id(1) % heads_kv
    batch = (tl.program_id(1) // heads_kv).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D

    moments += batch * heads_kv * (1 + GROUP) * 2 * D + columns
    mean = tl.load(moments + head_kv * 2 * D, inside, 0.0)
    variance = tl.load(moments + head_kv * 2 * D + D, inside, 0.0)
    largest = tl.zeros([BLOCK_D], tl.float32)
    for member in range(GROUP):
        of_head = moments + (heads_kv + head_kv * GROUP + member) * 2 * D
        mean_q = tl.load(of_head, inside, 0.0)
        largest = tl.maximum(largest, tl.load(of_head + D, inside, 0.0) + mean_q * mean_q)
    used = mean * mean > variance * least
    spread = scale * scale * tl.sum(tl.where(used, largest * variance, 0.0), 0)
    c = tl.where(spread <= most, tl.where(used, coarse(mean), 0.0), 0.0)
    c = tl.minimum(tl.maximum(c, -largest_c), largest_c).to(center.dtype.element_ty)
    if tl.program_id(0) == 0:
        tl.store(center + (batch * heads_kv + head_kv) * D + columns, c, inside)

    c = c.to(tl.float32)
    moves = tl.max(tl.abs(c), 0) > 0
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    for member in range(GROUP):
        head = (head_kv * GROUP + member).to(tl.int64)
        shifted = tl.load(lse + batch * lse_stride_b + head * lse_stride_h + row, valid, 0.0)
        if moves:
            x = q + batch * q_stride_b + head * q_stride_h
            x += row.to(tl.int64)[:, None] * q_stride_s + columns[None, :]
            tile = tl.load(x, valid[:, None] & inside[None, :], 0.0).to(tl.float32)
            shifted -= scale * tl.sum(tile * c[None, :], 1)
        tl.store(result + (batch * heads_kv * GROUP + head) * rows + row, shifted, valid)


@triton.jit(do_not_specialize=["queries", "keys"])
def subtract_kernel(
    k, k_stride_b, k_stride_s, k_stride_h,
    center, center_stride_b, center_stride_h,
    start, end, interval_stride_b, out, queries, keys, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = k - center, from the first query's start to the last one's end, and as far beyond as tiles extend."""
    row = tl.program_id(0) * KEYS
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    first = tl.load(start + batch * interval_stride_b)
    last = tl.load(end + batch * interval_stride_b + queries - 1)
    if (row + 2 * KEYS <= first) | (row >= last + KEYS):
        return
    rows = row + tl.arange(0, KEYS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < keys)[:, None] & (columns < D)[None, :]
    c = tl.load(center + batch * center_stride_b + head * center_stride_h + columns, columns < D, 0.0).to(tl.float32)
    k += batch * k_stride_b + head.to(tl.int64) * k_stride_h
    tile = tl.load(k + rows.to(tl.int64)[:, None] * k_stride_s + columns[None, :], inside, 0.0)
    out += (batch * keys * heads + head) * D + rows.to(tl.int64)[:, None] * (heads * D) + columns[None, :]
    tl.store(out, (tile.to(tl.float32) - c[None, :]).to(tile.dtype), inside)


# -- launch


def subtract(k: Tensor, center: Tensor, intervals: Intervals) -> Tensor:
    """k - center, contiguous, for the keys that are seen and as far beyond as tiles extend. Others are not written.

    k [B, S, Hkv, D] and center [B, 1, Hkv, D] with a contiguous last dimension, of one dtype.
    """
    B, S, H, D = k.shape
    out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    with torch.cuda.device_of(k):
        subtract_kernel[(triton.cdiv(S, KEYS.value), B * H)](
            *(k, *k.stride()[:3]), *(center, center.stride(0), center.stride(2)),
            *(intervals.start, intervals.end, interval_stride(intervals.start)), *(out, intervals.start.shape[1], S, H),
            D=D, BLOCK_D=triton.next_power_of_2(D), num_warps=warps_of_whole_rows(D),
        )  # fmt: skip
    return out


def center(q: Tensor, k: Tensor, lse: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """c [B, 1, Hkv, D] in k's dtype, and lse - scale q . c: see `compensation.center`.

    q [B, S, Hq, D] and k [B, S', Hkv, D] with a contiguous last dimension, lse fp32 [B, Hq, S], contiguous in S.
    """
    B, S, Hq, D = q.shape
    Hkv = k.shape[2]
    (step_q, count_q), (step_k, count_k) = sampling(S), sampling(k.shape[1])
    moments = torch.empty(B, Hkv + Hq, 2, D, dtype=torch.float32, device=q.device)
    c = torch.empty(B, 1, Hkv, D, dtype=k.dtype, device=q.device)
    result = torch.empty(B, Hq, S, dtype=torch.float32, device=q.device)
    largest_c = LARGEST if k.dtype == torch.float16 else float("inf")
    sizes = {"D": D, "BLOCK_D": triton.next_power_of_2(D)}
    with torch.cuda.device_of(q):
        moments_kernel[(Hkv + Hq, B)](
            *(q, *q.stride()[:3], step_q, count_q), *(k, *k.stride()[:3], step_k, count_k),
            *(moments, Hkv), **sizes, ROWS=SAMPLED, num_warps=warps_of_whole_rows(D, 16),
        )  # fmt: skip
        center_kernel[(triton.cdiv(S, SHIFTED_ROWS), B * Hkv)](
            *(q, *q.stride()[:3]), *(lse, *lse.stride()[:2]), *(moments, c, result),
            *(S, Hkv, scale, least_share(count_k), largest_c, SPREAD**2),
            GROUP=Hq // Hkv, **sizes, BLOCK=SHIFTED_ROWS, num_warps=warps_of_whole_rows(D, 8),
        )  # fmt: skip
    return c, result
