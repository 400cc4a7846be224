"""Attention forward in plain Triton, sm_80 and up: every query row i attends to the keys start[i]:end[i].

One program holds BLOCK_Q query rows of one head and loops over the keys, BLOCK_K at a time. With s = q k^T,
exponentials in base 2 and c = scale log2(e), each tile updates the softmax state of a row (maximum m, sum z, output
acc):

    m' = max(m, c max_j s_j)      p_j = 2^(c s_j - m')           alpha = 2^(m - m')
    z' = alpha z + sum_j p_j      acc' = alpha acc + p v

and at the end out = acc / z, lse = ln(2) (m + log2 z). A carried Partial is also such a state, with m = log2(e) lse,
z = 1 and acc = out, and is merged last. A softcap replaces s by tanh(s scale / softcap) and c by softcap log2(e).

The intervals never decrease. The bounds of a tile's first and last row therefore tell which keys all of its rows see
(full tiles) and which only some (edges, on either side). They are processed in the order 1. full, 2. last, 3. edge:

    keys      lo ......... all_from ................ all_to ......... hi
    tiles     | edge | edge |  full  |  full  |  full  | last | edge |

The pipeline over full tiles. The tensor cores compute the next tile's scores during this tile's exponentials:

    copy engine     k2 v1        k3 v2        k4 v3
    tensor cores    s1 = q k1 |  s2 = q k2 . acc += p1 v1 |  s3 = q k3 . acc += p2 v2 |
    everything else           |  p1 = 2^(c s1 - m)        |  p2 = 2^(c s2 - m)        |
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.intervals import Intervals
from ringflash.kernels.checks import check_out, check_rows, check_seen, like_out
from ringflash.kernels.portable_parts import (
    LARGE_SHARED,
    LN_2,
    LOG2_E_,
    NEG_INF,
    Tuning,
    arch,
    check_inputs,
    exact_tuning,
    interval_stride,
    load_tile,
    outputs,
    result_without_keys,
    score_scales,
    seen_argument,
    softcap,
    supports,
    tile_argument,
    tile_run,
    visible,
    warps_of_64_rows,
)
from ringflash.partial import Partial

__all__ = ["forward", "supports"]


def tuning_for(head_dim: int, dtype: torch.dtype, arch: int) -> Tuning:
    """The forward's tuning for a head size, dtype and compute capability (80, 90, 100, ...)."""
    tma = arch >= 90
    if dtype == torch.float32:
        return exact_tuning(tma)
    if arch in LARGE_SHARED:
        if head_dim <= 64:  # two programs fit an SM and hide each other's exponentials: 370 TFLOP/s, full, H100
            return Tuning(128, 64, warps=4, stages=3, tma=tma)
        if head_dim <= 128:  # 511 TFLOP/s, full, H100; 479 with 64 keys and 3 stages. 224 of 227 KB
            return Tuning(128, 128, warps=8, stages=2, tma=tma)
        if head_dim <= 256:
            return Tuning(128, 32, warps=8, stages=2, tma=tma)  # 160 KB; 64 keys would take 256 KB
        return Tuning(64, 32, warps=warps_of_64_rows(arch), stages=2, tma=tma)  # 208 KB
    # The largest tiles that do not spill with two tiles of scores in registers, and fit the 99 KB of sm_86 and sm_120.
    if head_dim <= 64:
        return Tuning(128, 64, warps=8, stages=3, tma=tma)
    if head_dim <= 128:
        return Tuning(128, 64, warps=8, stages=2, tma=tma)
    if head_dim <= 256:
        return Tuning(64, 32, warps=8, stages=2, tma=tma)
    return Tuning(32, 32, warps=4, stages=2, tma=tma)


# -- the forward


@triton.jit
def softmax_step(s, m, z, c, EDGE: tl.constexpr):
    """Update a row's maximum and sum with a tile of scores: the weights p, the new m and z, and acc's factor."""
    m_new = tl.maximum(m, tl.max(s, 1) * c)
    shift = m_new
    if EDGE:
        shift = tl.where(m_new == NEG_INF, 0.0, m_new)  # a row that has seen nothing: -inf - -inf would be NaN
    p = tl.math.exp2(s * c - shift[:, None])
    alpha = tl.math.exp2(m - shift)
    return p, m_new, z * alpha + tl.sum(p, 1), alpha


@triton.jit
def softmax_end(m, z):
    """A row's natural lse, and acc's divisor: -inf and 1 if the row has seen nothing, where acc is 0."""
    seen = z > 0
    z = tl.where(seen, z, 1.0)
    return tl.where(seen, (m + tl.math.log2(z)) * LN_2, NEG_INF), z


@triton.jit(do_not_specialize=["carried", "seen_stride_b", "seen_later"])
def forward_kernel(
    q, q_stride_b, q_stride_s, q_stride_h,
    k, k_stride_b, k_stride_s, k_stride_h,
    v, v_stride_b, v_stride_s, v_stride_h,
    out, out_stride_b, out_stride_s, out_stride_h,
    final, final_stride_b, final_stride_s, final_stride_h, seen, seen_stride_b, seen_later,
    carry, carry_stride_b, carry_stride_s, carry_stride_h,
    lse, lse_stride_b, lse_stride_h,
    start, end, interval_stride_b,
    queries, keys, heads_kv, carried, c, cap_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, CAPPED: tl.constexpr,
    IN_PLACE: tl.constexpr, FINISHES: tl.constexpr,
):  # fmt: skip
    """One query tile of one head. Launch order: heads of a group, then tiles from the last, then KV heads and batch.

    Under a causal mask, the last tile sees the most keys. It starts first, and short tiles fill the gaps at the end.
    The heads that share K and V run side by side, so that their tiles come from L2.
    """
    program = tl.program_id(0)
    q_tiles = tl.cdiv(queries, BLOCK_Q)
    first = (q_tiles - 1 - program // GROUP % q_tiles) * BLOCK_Q
    head_kv = program // (GROUP * q_tiles) % heads_kv
    batch = program // (GROUP * q_tiles) // heads_kv
    head = head_kv * GROUP + program % GROUP

    q = (q, q_stride_b, q_stride_s, q_stride_h, queries)
    k = (k, k_stride_b, k_stride_s, k_stride_h, keys)
    v = (v, v_stride_b, v_stride_s, v_stride_h, keys)
    start += batch.to(tl.int64) * interval_stride_b
    end += batch.to(tl.int64) * interval_stride_b
    last = tl.minimum(first + BLOCK_Q, queries) - 1
    lo, tiles, full_from, full_to = tile_run(start, end, first, last, BLOCK_K)
    if IN_PLACE and tiles == 0:
        return
    # The tile after the full run is computed separately, to drain the loop. There always is one: the last full tile if
    # the full run reaches the end, and an empty one if the rows see nothing.
    tiles = tl.maximum(tiles, 1)
    full_from = tl.minimum(full_from, tiles - 1)
    full_to = tl.maximum(full_from, tl.minimum(full_to, tiles - 1))

    q_tile = load_tile(q, batch, head, first, BLOCK_Q, BLOCK_D, D, TMA)

    # One pass per chunk of the result's columns, as wide as registers allow: one chunk up to a head size of 256.
    for column in tl.range(0, DV, BLOCK_DV):
        m = tl.full([BLOCK_Q], NEG_INF, tl.float32)
        z = tl.zeros([BLOCK_Q], tl.float32)
        acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)

        # 1. Full tiles: no mask.
        full_key = lo + full_from * BLOCK_K
        k_tile = load_tile(k, batch, head_kv, full_key, BLOCK_K, BLOCK_D, D, TMA)
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        for key in tl.range(full_key, lo + full_to * BLOCK_K, BLOCK_K, num_stages=STAGES):
            k_tile = load_tile(k, batch, head_kv, key + BLOCK_K, BLOCK_K, BLOCK_D, D, TMA)
            s_next = tl.dot(q_tile, k_tile.T, input_precision="ieee")
            if CAPPED:
                s, _ = softcap(s, cap_scale)
            p, m, z, alpha = softmax_step(s, m, z, c, EDGE=False)
            v_tile = load_tile(v, batch, head_kv, key, BLOCK_K, BLOCK_DV, DV, TMA, column)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
            s = s_next

        # 2. The tile after them, whose scores are already computed.
        rows = first + tl.arange(0, BLOCK_Q)
        valid = rows < queries
        row_start = tl.load(start + rows, valid, 0)
        row_end = tl.load(end + rows, valid, 0)
        key = lo + full_to * BLOCK_K
        if CAPPED:
            s, _ = softcap(s, cap_scale)
        s = tl.where(visible(row_start, row_end, key + tl.arange(0, BLOCK_K)), s, NEG_INF)
        p, m, z, alpha = softmax_step(s, m, z, c, EDGE=True)
        v_tile = load_tile(v, batch, head_kv, key, BLOCK_K, BLOCK_DV, DV, TMA, column)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")

        # 3. Edge tiles, before the full run and beyond the tile after it.
        for tile in tl.range(0, tiles - 1 - (full_to - full_from), num_stages=STAGES):
            key = lo + tl.where(tile < full_from, tile, tile + 1 + full_to - full_from) * BLOCK_K
            k_tile = load_tile(k, batch, head_kv, key, BLOCK_K, BLOCK_D, D, TMA)
            s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
            if CAPPED:
                s, _ = softcap(s, cap_scale)
            s = tl.where(visible(row_start, row_end, key + tl.arange(0, BLOCK_K)), s, NEG_INF)
            p, m, z, alpha = softmax_step(s, m, z, c, EDGE=True)
            v_tile = load_tile(v, batch, head_kv, key, BLOCK_K, BLOCK_DV, DV, TMA, column)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")

        # The carried state is merged here and not at the start, because its addresses would take registers throughout
        # the loops. Without a carry, nothing is loaded. (Compiled without this part, the kernel ran no exponentials
        # under its products: what ptxas overlaps in a loop depends on what follows it. tests/kernels/test_compiles.py
        # checks this.) Only the last pass writes lse, which every pass reads.
        columns = column + tl.arange(0, BLOCK_DV)
        inside = valid[:, None] & (columns < DV)[None, :]
        lse_head = lse + batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h
        m_carry = tl.load(lse_head + rows, valid & (carried > 0), NEG_INF) * LOG2_E_
        carry_head = carry + batch.to(tl.int64) * carry_stride_b + head.to(tl.int64) * carry_stride_h
        carry_rows = carry_head + rows.to(tl.int64)[:, None] * carry_stride_s + columns[None, :]
        m_new = tl.maximum(m, m_carry)
        shift = tl.where(m_new == NEG_INF, 0.0, m_new)
        alpha, alpha_carry = tl.math.exp2(m - shift), tl.math.exp2(m_carry - shift)
        acc = acc * alpha[:, None] + tl.load(carry_rows, inside & (carried > 0), 0.0) * alpha_carry[:, None]
        z = z * alpha + alpha_carry
        row_lse, z = softmax_end(m_new, z)
        if column + BLOCK_DV >= DV:
            tl.store(lse_head + rows, row_lse, valid)
        acc = acc / z[:, None]
        if FINISHES:
            seen_rows = seen + batch.to(tl.int64) * seen_stride_b
            now = tl.load(seen_rows + last + 1) - tl.load(seen_rows + first)
            later = tl.load(seen_rows + seen_later + last + 1) - tl.load(seen_rows + seen_later + first)
            # A tile that no later call sees is complete. If this call does not see it either, an earlier one wrote it.
            complete = (later == 0) & ((now > 0) | (carried == 0))
            final_head = final + batch.to(tl.int64) * final_stride_b + head.to(tl.int64) * final_stride_h
            final_rows = final_head + rows.to(tl.int64)[:, None] * final_stride_s + columns[None, :]
            tl.store(final_rows, acc.to(final.dtype.element_ty), inside & complete)
            inside &= later > 0
        out_head = out + batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
        out_rows = out_head + rows.to(tl.int64)[:, None] * out_stride_s + columns[None, :]
        tl.store(out_rows, acc.to(out.dtype.element_ty), inside)


# -- launch


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    *,
    scale: float,
    softcap: float | None = None,
    carry: Partial | None = None,
    out: Tensor | None = None,
    seen: Tensor | None = None,
    tuning: Tuning | None = None,
) -> Partial:
    """Attention over ``start:end`` of k and v, merged with carry. See `ringflash.kernels` for the contract.

    Raises ValueError, with the values, if `supports` refuses, if v or the carry do not fit q and k, or if scale is not
    positive (a row's maximum is taken before scaling). tuning replaces the table's choice.
    """
    check_inputs(q, k, scale, softcap, intervals, v=v)
    if carry is not None:
        check_rows("portable", like_out(q, v), **{"carry.out": carry.out, "carry.lse": carry.lse})
    if out is not None:
        check_out("portable", like_out(q, v), out)
    check_seen("portable", q, seen)
    if 0 in q.shape or 0 in k.shape:
        return result_without_keys(like_out(q, v), carry, out, seen)

    B, Sq, Hq, D = q.shape
    _, Skv, Hkv, DV = v.shape
    state, final = outputs(like_out(q, v), carry, out, seen)
    out, lse, carried = state.out, state.lse, (state if carry is None else carry).out
    t = tuning or tuning_for(max(D, DV), q.dtype, arch(q))
    width, chunk = triton.next_power_of_2(D), t.chunk(DV)
    with torch.cuda.device_of(q):
        forward_kernel[(B * Hq * triton.cdiv(Sq, t.block_q),)](
            *tile_argument("q", q, t.block_q, width, t.tma),
            *tile_argument("k", k, t.block_k, width, t.tma),
            *tile_argument("v", v, t.block_k, chunk, t.tma),
            *(out, *out.stride()[:3]),
            *(final, *final.stride()[:3]),
            *seen_argument(seen, lse),
            *(carried, *carried.stride()[:3]),
            *(lse, *lse.stride()[:2]),
            *(intervals.start, intervals.end, interval_stride(intervals.start)),
            *(Sq, Skv, Hkv, int(carry is not None), *score_scales(scale, softcap)),
            GROUP=Hq // Hkv, D=D, BLOCK_D=width, DV=DV, BLOCK_DV=chunk,
            BLOCK_Q=t.block_q, BLOCK_K=t.block_k, STAGES=t.stages, TMA=t.tma, CAPPED=softcap is not None,
            IN_PLACE=carry is not None and carried is out, FINISHES=final is not out,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return state
