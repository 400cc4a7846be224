"""Attention backward in plain Triton, sm_80 and up, bit-equal from run to run: every gradient has one writer.

With the weights of the whole softmax, p = 2^(c s - log2(e) lse), and delta = rowsum(dout * out),

    dp = dout v^T    ds = p (dp - delta)    dq += scale ds k    dk += scale ds^T q    dv += p^T dout

where a softcap, s = tanh(q k^T scale / softcap), also multiplies ds by its derivative. There are two kernels, and each
recomputes s and dp:

- `dq_kernel` holds BLOCK_Q query rows and loops over the keys start:end that they see;
- `dkdv_kernel` holds BLOCK_K keys of one KV head and loops over the queries query_start:query_end that see them, for
  each query head of the group in turn.

Both process the full tiles first, then the edges, as drawn in `portable_forward`.

The pipeline of a step of dkdv_kernel. All products are transposed so that p and ds stay in registers:

    copy engine      q2 dout2
    tensor cores     s = k q1^T |  dp = v dout1^T     | dv += p dout1 . dk += ds q1 |
    everything else             |  p = 2^(c s - lse)  | ds = p (dp - delta)         |
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.intervals import Intervals
from ringflash.kernels.checks import check_center, check_key_gradients, check_rows
from ringflash.kernels.portable_compensation import center, subtract
from ringflash.kernels.portable_parts import (
    LARGE_SHARED,
    LOG2_E_,
    NEG_INF,
    Tuning,
    arch,
    check_inputs,
    exact_tuning,
    interval_stride,
    load_tile,
    score_scales,
    softcap,
    tile_argument,
    tile_run,
    visible,
    warps_of_64_rows,
    warps_of_whole_rows,
)

__all__ = ["backward", "center", "delta", "round_dq", "round_into"]

DELTA_ROWS = 64  # per program of delta_kernel
ROUND_ROWS = 32  # per program of round_kernel


def dq_tuning_for(head_dim: int, dtype: torch.dtype, arch: int) -> Tuning:
    """The tuning of dq_kernel for a head size, dtype and compute capability (80, 90, 100, ...)."""
    tma = arch >= 90
    if dtype == torch.float32:
        return exact_tuning(tma)
    if arch in LARGE_SHARED:
        if head_dim <= 128:  # FlexAttention's tiles for H100; at 128 they leave 44 registers free and hold 161 KB
            return Tuning(128, 64, warps=8, stages=3, tma=tma)
        if head_dim <= 256:  # dq takes 128 registers per thread; 192 KB
            return Tuning(128, 32, warps=8, stages=2, tma=tma)
        return Tuning(64, 16, warps=warps_of_64_rows(arch), stages=2, tma=tma)  # 208 KB
    # The largest tiles within 99 KB that spill in no loop. More warps than this would compute some products twice.
    if head_dim <= 64:
        return Tuning(64, 64, warps=4, stages=3, tma=tma)
    if head_dim <= 128:
        return Tuning(64, 64, warps=8, stages=2, tma=tma)
    return Tuning(32, 32, warps=4, stages=2 if head_dim <= 256 else 1, tma=tma)


def dkdv_tuning_for(head_dim: int, dtype: torch.dtype, arch: int) -> tuple[Tuning, ...]:
    """The tunings of dkdv_kernel for a head size, dtype and compute capability (80, 90, 100, ...).

    There is one if a program computes dk and dv, or there are two, for dk and for dv. Two launches compute scores
    twice, but in tiles twice as large, since registers hold only one gradient.
    """
    tma = arch >= 90
    if dtype == torch.float32:
        return (exact_tuning(tma),) if head_dim <= 128 else (exact_tuning(tma), exact_tuning(tma))
    if arch in LARGE_SHARED:
        if head_dim <= 64:
            return (Tuning(64, 128, warps=8, stages=3, tma=tma),)
        if head_dim <= 128:  # dk and dv take 128 registers per thread, s and dp 64: at its limit, a few addresses spill
            return (Tuning(64, 128, warps=8, stages=2, tma=tma),)
        if head_dim <= 256:  # one of them takes 128; 192 KB each
            return Tuning(32, 128, warps=8, stages=2, tma=tma), Tuning(64, 128, warps=8, stages=2, tma=tma)
        warps = warps_of_64_rows(arch)  # 208 and 160 KB
        return Tuning(16, 64, warps=warps, stages=2, tma=tma), Tuning(32, 64, warps=warps, stages=2, tma=tma)
    # As for dq.
    if head_dim <= 64:
        return (Tuning(64, 64, warps=4, stages=2, tma=tma),)
    if head_dim <= 128:
        return (Tuning(64, 64, warps=8, stages=2, tma=tma),)
    stages = 2 if head_dim <= 256 else 1
    return Tuning(32, 32, warps=4, stages=stages, tma=tma), Tuning(32, 32, warps=4, stages=stages, tma=tma)


@triton.jit
def weights(s, lse, c, cap_scale, CAPPED: tl.constexpr):
    """p and the softcap's derivative, from products s and a base-2 log-sum-exp that broadcasts over them."""
    slope = 1.0
    if CAPPED:
        s, slope = softcap(s, cap_scale)
    return tl.math.exp2(s * c - lse), slope


@triton.jit
def load_lse(lse, rows, valid):
    """Rows of lse in base 2; a row that sees nothing gets +inf, so that all its weights are 0."""
    row_lse = tl.load(lse + rows, valid, 0.0)
    return tl.where(row_lse == NEG_INF, float("inf"), row_lse * LOG2_E_)


@triton.jit
def store_gradient(x, tile, rows, valid, stride_s, column, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """x[rows] += tile where x is fp32, else x[rows] = tile, in BLOCK_D columns from `column` on."""
    columns = column + tl.arange(0, BLOCK_D)
    x += rows.to(tl.int64)[:, None] * stride_s + columns[None, :]
    inside = valid[:, None] & (columns < D)[None, :]
    if x.dtype.element_ty == tl.float32:
        tl.store(x, tl.load(x, inside, 0.0) + tile, inside)
    else:
        tl.store(x, tile.to(x.dtype.element_ty), inside)


# -- dq: one program per query tile


@triton.jit
def dq_step(
    acc, q_tile, dout_tile, row_lse, row_delta, row_start, row_end, k, v, k_part, batch, head_kv, key, column,
    c, cap_scale,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr, BLOCK_DV: tl.constexpr, DV: tl.constexpr,
    BLOCK_C: tl.constexpr, TMA: tl.constexpr, CAPPED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """acc += ds k for the keys of one tile, in BLOCK_C columns from `column` on."""
    k_tile = load_tile(k, batch, head_kv, key, BLOCK_K, BLOCK_D, D, TMA)
    v_tile = load_tile(v, batch, head_kv, key, BLOCK_K, BLOCK_DV, DV, TMA)
    s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
    dp = tl.dot(dout_tile, v_tile.T, input_precision="ieee")
    p, slope = weights(s, row_lse[:, None], c, cap_scale, CAPPED)
    if EDGE:
        p = tl.where(visible(row_start, row_end, key + tl.arange(0, BLOCK_K)), p, 0.0)
    ds = p * (dp - row_delta[:, None]) * slope
    if BLOCK_C < BLOCK_D:
        k_tile = load_tile(k_part, batch, head_kv, key, BLOCK_K, BLOCK_C, D, TMA, column)
    return tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")


@triton.jit
def dq_kernel(
    q, q_stride_b, q_stride_s, q_stride_h,
    k, k_stride_b, k_stride_s, k_stride_h,
    v, v_stride_b, v_stride_s, v_stride_h,
    dout, dout_stride_b, dout_stride_s, dout_stride_h,
    dq, dq_stride_b, dq_stride_s, dq_stride_h,
    lse, lse_stride_b, lse_stride_h,
    delta, delta_stride_b, delta_stride_h,
    start, end, interval_stride_b,
    queries, keys, heads_kv, scale, c, cap_scale, k_part,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """One query tile of one head, launched in the order of `forward_kernel`."""
    program = tl.program_id(0)
    q_tiles = tl.cdiv(queries, BLOCK_Q)
    first = (q_tiles - 1 - program // GROUP % q_tiles) * BLOCK_Q
    head_kv = program // (GROUP * q_tiles) % heads_kv
    batch = program // (GROUP * q_tiles) // heads_kv
    head = head_kv * GROUP + program % GROUP

    start += batch.to(tl.int64) * interval_stride_b
    end += batch.to(tl.int64) * interval_stride_b
    last = tl.minimum(first + BLOCK_Q, queries) - 1
    lo, tiles, full_from, full_to = tile_run(start, end, first, last, BLOCK_K)
    if tiles == 0:
        return

    q = (q, q_stride_b, q_stride_s, q_stride_h, queries)
    k = (k, k_stride_b, k_stride_s, k_stride_h, keys)
    v = (v, v_stride_b, v_stride_s, v_stride_h, keys)
    k_part = (k_part, k_stride_b, k_stride_s, k_stride_h, keys)
    dout = (dout, dout_stride_b, dout_stride_s, dout_stride_h, queries)
    q_tile = load_tile(q, batch, head, first, BLOCK_Q, BLOCK_D, D, TMA)
    dout_tile = load_tile(dout, batch, head, first, BLOCK_Q, BLOCK_DV, DV, TMA)
    rows = first + tl.arange(0, BLOCK_Q)
    valid = rows < queries
    row_lse = load_lse(lse + batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h, rows, valid)
    delta += batch.to(tl.int64) * delta_stride_b + head.to(tl.int64) * delta_stride_h
    row_delta = tl.load(delta + rows, valid, 0.0)

    # One pass per chunk of dq's columns, as in `forward_kernel`.
    for column in tl.range(0, D, BLOCK_C):
        acc = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)

        # 1. Full tiles: no mask.
        for key in tl.range(lo + full_from * BLOCK_K, lo + full_to * BLOCK_K, BLOCK_K, num_stages=STAGES):
            acc = dq_step(
                acc, q_tile, dout_tile, row_lse, row_delta, rows, rows, k, v, k_part, batch, head_kv, key,
                column, c, cap_scale, BLOCK_K, BLOCK_D, D, BLOCK_DV, DV, BLOCK_C, TMA, CAPPED, EDGE=False,
            )  # fmt: skip

        # 2. Edge tiles, before and after them.
        row_start = tl.load(start + rows, valid, 0)
        row_end = tl.load(end + rows, valid, 0)
        for tile in tl.range(0, tiles - (full_to - full_from), num_stages=STAGES):
            key = lo + tl.where(tile < full_from, tile, tile + full_to - full_from) * BLOCK_K
            acc = dq_step(
                acc, q_tile, dout_tile, row_lse, row_delta, row_start, row_end, k, v, k_part, batch, head_kv, key,
                column, c, cap_scale, BLOCK_K, BLOCK_D, D, BLOCK_DV, DV, BLOCK_C, TMA, CAPPED, EDGE=True,
            )  # fmt: skip

        dq_head = dq + batch.to(tl.int64) * dq_stride_b + head.to(tl.int64) * dq_stride_h
        store_gradient(dq_head, acc * scale, rows, valid, dq_stride_s, column, BLOCK_C, D)


# -- dk and dv: one program per key tile


@triton.jit
def dkdv_step(
    dk_acc, dv_acc, k_tile, v_tile, key_start, key_end, q, dout, q_part, lse, delta, batch, head, row, queries,
    column, c, cap_scale,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr, BLOCK_DV: tl.constexpr, DV: tl.constexpr,
    BLOCK_C: tl.constexpr, TMA: tl.constexpr, CAPPED: tl.constexpr, OF_K: tl.constexpr,
    OF_V: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dk_acc += ds q (OF_K) and dv_acc += p dout (OF_V) for one tile of queries, in columns from `column` on.

    s, p, dp, ds are [keys, queries].
    """
    q_tile = load_tile(q, batch, head, row, BLOCK_Q, BLOCK_D, D, TMA)
    dout_tile = load_tile(dout, batch, head, row, BLOCK_Q, BLOCK_DV, DV, TMA, 0 if OF_K else column)
    lse, lse_stride_b, lse_stride_h = lse
    delta, delta_stride_b, delta_stride_h = delta
    rows = row + tl.arange(0, BLOCK_Q)
    valid = rows < queries
    row_lse = load_lse(lse + batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h, rows, valid)
    delta += batch.to(tl.int64) * delta_stride_b + head.to(tl.int64) * delta_stride_h

    s = tl.dot(k_tile, q_tile.T, input_precision="ieee")
    if OF_K:
        dp = tl.dot(v_tile, dout_tile.T, input_precision="ieee")
    p, slope = weights(s, row_lse[None, :], c, cap_scale, CAPPED)
    if EDGE:
        p = tl.where(visible(key_start, key_end, rows), p, 0.0)
    if OF_V:
        dv_acc = tl.dot(p.to(dout_tile.dtype), dout_tile, dv_acc, input_precision="ieee")
    if OF_K:
        row_delta = tl.load(delta + rows, valid, 0.0)
        ds = p * (dp - row_delta[None, :]) * slope
        if BLOCK_C < BLOCK_D:
            q_tile = load_tile(q_part, batch, head, row, BLOCK_Q, BLOCK_C, D, TMA, column)
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    return dk_acc, dv_acc


@triton.jit
def dkdv_kernel(
    q, q_stride_b, q_stride_s, q_stride_h,
    k, k_stride_b, k_stride_s, k_stride_h,
    v, v_stride_b, v_stride_s, v_stride_h,
    dout, dout_stride_b, dout_stride_s, dout_stride_h,
    dk, dk_stride_b, dk_stride_s, dk_stride_h,
    dv, dv_stride_b, dv_stride_s, dv_stride_h,
    lse, lse_stride_b, lse_stride_h,
    delta, delta_stride_b, delta_stride_h,
    start, end, interval_stride_b,
    queries, keys, heads_kv, scale, c, cap_scale, q_part,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    CAPPED: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr,
):  # fmt: skip
    """dk (OF_K) and dv (OF_V) of one key tile of one KV head; start and end are the queries that see each key.

    Launch order: tiles from the first, then KV heads. Under a causal mask, the first keys are seen by the most queries.
    """
    program = tl.program_id(0)
    k_tiles = tl.cdiv(keys, BLOCK_K)
    first = program % k_tiles * BLOCK_K
    head_kv = program // k_tiles % heads_kv
    batch = program // k_tiles // heads_kv

    start += batch.to(tl.int64) * interval_stride_b
    end += batch.to(tl.int64) * interval_stride_b
    last = tl.minimum(first + BLOCK_K, keys) - 1
    lo, tiles, full_from, full_to = tile_run(start, end, first, last, BLOCK_Q)
    if dk.dtype.element_ty == tl.float32 and tiles == 0:  # nothing to add; in 16 bits, zeros to write
        return

    q = (q, q_stride_b, q_stride_s, q_stride_h, queries)
    q_part = (q_part, q_stride_b, q_stride_s, q_stride_h, queries)
    k = (k, k_stride_b, k_stride_s, k_stride_h, keys)
    v = (v, v_stride_b, v_stride_s, v_stride_h, keys)
    dout = (dout, dout_stride_b, dout_stride_s, dout_stride_h, queries)
    lse = (lse, lse_stride_b, lse_stride_h)
    delta = (delta, delta_stride_b, delta_stride_h)
    k_tile = load_tile(k, batch, head_kv, first, BLOCK_K, BLOCK_D, D, TMA)
    v_tile = load_tile(v, batch, head_kv, first, BLOCK_K, BLOCK_DV, DV, TMA) if OF_K else k_tile  # dk's alone
    rows = first + tl.arange(0, BLOCK_K)
    valid = rows < keys

    # One pass per chunk of the gradient's columns; a single one if a program has both gradients.
    tl.static_assert(not (OF_K and OF_V) or BLOCK_C == BLOCK_D)
    for column in tl.range(0, D if OF_K else DV, BLOCK_C):
        dk_acc = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
        dv_acc = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)

        # 1. Tiles that see every key: no mask. One loop over heads and tiles, so that loads run ahead across heads.
        full = full_to - full_from
        for step in tl.range(0, GROUP * full, num_stages=STAGES):
            head = head_kv * GROUP + step // full
            row = lo + (full_from + step % full) * BLOCK_Q
            dk_acc, dv_acc = dkdv_step(
                dk_acc, dv_acc, k_tile, v_tile, rows, rows, q, dout, q_part, lse, delta, batch, head, row,
                queries, column, c, cap_scale, BLOCK_Q, BLOCK_D, D, BLOCK_DV, DV, BLOCK_C, TMA, CAPPED, OF_K, OF_V,
                EDGE=False,
            )  # fmt: skip

        # 2. Tiles before and after them that see only some of the keys.
        key_start = tl.load(start + rows, valid, 0)
        key_end = tl.load(end + rows, valid, 0)
        edge = tiles - full
        for step in tl.range(0, GROUP * edge, num_stages=STAGES):
            head = head_kv * GROUP + step // edge
            tile = step % edge
            row = lo + tl.where(tile < full_from, tile, tile + full) * BLOCK_Q
            dk_acc, dv_acc = dkdv_step(
                dk_acc, dv_acc, k_tile, v_tile, key_start, key_end, q, dout, q_part, lse, delta, batch, head, row,
                queries, column, c, cap_scale, BLOCK_Q, BLOCK_D, D, BLOCK_DV, DV, BLOCK_C, TMA, CAPPED, OF_K, OF_V,
                EDGE=True,
            )  # fmt: skip

        dk_head = dk + batch.to(tl.int64) * dk_stride_b + head_kv.to(tl.int64) * dk_stride_h
        dv_head = dv + batch.to(tl.int64) * dv_stride_b + head_kv.to(tl.int64) * dv_stride_h
        if OF_K:
            store_gradient(dk_head, dk_acc * scale, rows, valid, dk_stride_s, column, BLOCK_C, D)
        if OF_V:
            store_gradient(dv_head, dv_acc, rows, valid, dv_stride_s, column, BLOCK_DV, DV)


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    out, out_stride_b, out_stride_s, out_stride_h,
    dout, dout_stride_b, dout_stride_s, dout_stride_h,
    result, rows, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rowsum(out * dout) for BLOCK rows of one head, in one pass over memory; torch would write fp32 copies."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    row_ = row.to(tl.int64)[:, None]
    x = tl.load(out + batch * out_stride_b + head * out_stride_h + row_ * out_stride_s + column[None, :], inside, 0.0)
    y = tl.load(
        dout + batch * dout_stride_b + head * dout_stride_h + row_ * dout_stride_s + column[None, :], inside, 0.0
    )
    products = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(result + tl.program_id(1).to(tl.int64) * rows + row, products, row < rows)


@triton.jit(do_not_specialize=["rows"])
def round_kernel(
    x, x_stride_b, x_stride_s, x_stride_h,
    out, out_stride_b, out_stride_s, out_stride_h,
    rows, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x for BLOCK rows of one head. torch reads strided tensors of another dtype at half of memory's speed."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < rows)[:, None] & (column < D)
    row_ = row.to(tl.int64)[:, None]
    tile = tl.load(x + batch * x_stride_b + head * x_stride_h + row_ * x_stride_s + column, inside, 0.0)
    out += batch * out_stride_b + head * out_stride_h
    tl.store(out + row_ * out_stride_s + column, tile.to(out.dtype.element_ty), inside)


# -- launch


def delta(out: Tensor, dout: Tensor) -> Tensor:
    """rowsum(out * dout) of [B, S, H, D] with a contiguous last dimension, as fp32 [B, H, S]."""
    B, S, H, D = out.shape
    result = torch.empty(B, H, S, dtype=torch.float32, device=out.device)
    with torch.cuda.device_of(out):
        delta_kernel[(triton.cdiv(S, DELTA_ROWS), B * H)](
            *(out, *out.stride()[:3]), *(dout, *dout.stride()[:3]), *(result, S, H),
            D=D, BLOCK_D=triton.next_power_of_2(D), BLOCK=DELTA_ROWS, num_warps=warps_of_whole_rows(D),
        )  # fmt: skip
    return result


def round_dq(out: Tensor, dq: Tensor, *, scale: float) -> None:
    """out = dq, both [B, S, H, D], rounded to its dtype: this kernel sums up the gradient itself."""
    round_into(out, dq)


def round_into(out: Tensor, x: Tensor) -> None:
    """out = x, rounded to its dtype; both [B, S, H, D], any strides with a contiguous last dimension."""
    B, S, H, D = x.shape
    if 0 in x.shape:
        return
    with torch.cuda.device_of(x):
        round_kernel[(triton.cdiv(S, ROUND_ROWS), B * H)](
            *(x, *x.stride()[:3]), *(out, *out.stride()[:3]), *(S, H),
            D=D, BLOCK_D=triton.next_power_of_2(D), BLOCK=ROUND_ROWS, num_warps=warps_of_whole_rows(D),
        )  # fmt: skip


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    intervals: Intervals,
    *,
    scale: float,
    softcap: float | None = None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    center: Tensor | None = None,
    calls: int = 1,
    dq_tuning: Tuning | None = None,
    dkdv_tuning: tuple[Tuning, ...] | None = None,
) -> None:
    """Add this block's gradients to dq, dk and dv, or write dk and dv. See `ringflash.kernels` for the contract.

    Raises ValueError, with the values, if `portable_parts.supports` refuses, if a tensor does not fit q and k, or if
    scale is not positive. The tunings replace the tables' choice.
    """
    check_inputs(q, k, scale, softcap, intervals, v=v, dout=dout)
    check_rows("portable", q, lse=lse, delta=delta, dq=dq)
    check_key_gradients("portable", k, v, dk, dv)
    check_center("portable", k, center)
    if 0 in q.shape or 0 in k.shape:
        if dk.dtype != torch.float32:
            torch._foreach_zero_((dk, dv))
        return
    if center is not None:
        k = subtract(k, center, intervals)
    B, Sq, Hq, D = q.shape
    _, Skv, Hkv, DV = v.shape
    width, width_v = triton.next_power_of_2(D), triton.next_power_of_2(DV)
    rows = (*(lse, *lse.stride()[:2]), *(delta, *delta.stride()[:2]))
    sizes = (Sq, Skv, Hkv, scale, *score_scales(scale, softcap))

    def launch(
        kernel, programs: int, t: Tuning, gradients: tuple[Tensor, ...], start: Tensor, end: Tensor, **of: bool
    ) -> None:
        dv_alone = not of.get("OF_K", True)
        chunk = t.chunk(DV if dv_alone else D)
        of_values = chunk if dv_alone else width_v
        part, block = (q, t.block_q) if of else (k, t.block_k)  # which the product with ds reads
        kernel[(programs,)](
            *tile_argument("q", q, t.block_q, width, t.tma),
            *tile_argument("k", k, t.block_k, width, t.tma),
            *tile_argument("v", v, t.block_k, of_values, t.tma),
            *tile_argument("dout", dout, t.block_q, of_values, t.tma),
            *(argument for x in gradients for argument in (x, *x.stride()[:3])),
            *rows, start, end, interval_stride(start), *sizes,
            tile_argument("part", part, block, chunk, t.tma)[0] if chunk < width else part,
            GROUP=Hq // Hkv, D=D, BLOCK_D=width, DV=DV, BLOCK_DV=of_values, BLOCK_C=chunk,
            BLOCK_Q=t.block_q, BLOCK_K=t.block_k, STAGES=t.stages, TMA=t.tma, CAPPED=softcap is not None, **of,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    t_dq = dq_tuning or dq_tuning_for(max(D, DV), q.dtype, arch(q))
    ts_dkdv = dkdv_tuning or dkdv_tuning_for(max(D, DV), q.dtype, arch(q))
    with torch.cuda.device_of(q):
        launch(dq_kernel, B * Hq * triton.cdiv(Sq, t_dq.block_q), t_dq, (dq,), intervals.start, intervals.end)
        for i, t in enumerate(ts_dkdv):
            launch(
                dkdv_kernel, B * Hkv * triton.cdiv(Skv, t.block_k), t, (dk, dv),
                intervals.query_start, intervals.query_end, OF_K=i == 0, OF_V=i == len(ts_dkdv) - 1,
            )  # fmt: skip
