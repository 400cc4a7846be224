"""FlashDecoding in plain Triton, sm_80 and up: a few queries attend to a long cache, split among many programs.

A new token's query uses every key once, so decoding takes the time of reading the cache. With one program per query
head, most SMs would be idle, and each key would be read once per query head. Here, the keys start:end of a batch row
and KV head are divided into splits with one program each, and the query heads of a group are rows of one product (Dao
et al., 2023):

    keys       start ....... | ............. | ............. | .... end
    programs       split 0   |    split 1    |    split 2    |  split 3      each reads K and V once, for all its rows
    partials   (out, lse)_0    (out, lse)_1    (out, lse)_2    (out, lse)_3  fp32
    combine    lse = log sum_n exp(lse_n)      out = sum_n exp(lse_n - lse) out_n

Within a split, tiles update a row's softmax state as in `portable_forward`. The combination is `partial.merge` of all
parts at once. Ranks that hold parts of a cache use the same kernel.

The number of splits depends on the cache's capacity and the number of SMs, which the host knows. The size of a split
depends on start:end, which only the device knows: no length is copied to the host, and a step can be captured as a CUDA
graph. Keys beyond a row's end are never read, so a cache need not be cleared.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.kernels.checks import stride_refusal
from ringflash.kernels.portable_forward import softmax_end, softmax_step
from ringflash.kernels.portable_parts import (
    LARGE_SHARED,
    LOG2_E_,
    NEG_INF,
    Tuning,
    arch,
    exact_tuning,
    input_refusal,
    interval_stride,
    load_tile,
    score_scales,
    sm_count,
    softcap,
    visible,
)
from ringflash.partial import Partial

LEAST_KEYS = 256  # per split: shorter ones cost more in the combination than they save
MOST_SPLITS = 256
PARTS = 32  # loaded at once by the combination


def tuning_for(head_dim: int, dtype: torch.dtype, rows: int, arch: int) -> Tuning:
    """The tuning for a head size, dtype, number of query rows that share a KV head, and compute capability.

    Tiles are loaded by cp.async and not by the copy engine, since loads must stop at a row's end. Three stages of 64
    keys of 128 take 71 to 74 KB, which fits an SM of sm_86 (99 KB). On an H200, 128 keys (136 KB) were the fastest of
    52 tunings at 8k, 64k and 256k keys, 1 to 9 percent faster than 64.
    """
    if dtype == torch.float32:
        return exact_tuning(tma=False)
    block_q = min(64, max(16, triton.next_power_of_2(rows)))
    if head_dim <= 64:
        return Tuning(block_q, 128, warps=4, stages=3, tma=False)
    if head_dim <= 128 and block_q == 16 and arch in LARGE_SHARED:
        return Tuning(16, 128, warps=8, stages=3, tma=False)
    return Tuning(block_q, 64 if head_dim <= 128 else 32, warps=4, stages=3, tma=False)


def programs_per_sm(t: Tuning, head_dim: int) -> int:
    """Programs per SM: one if its tiles take more than half of the shared memory, otherwise two."""
    return 1 if t.block_k * triton.next_power_of_2(head_dim) > 64 * 128 else 2


def splits_for(capacity: int, programs: int, sms: int, programs_per_sm: int) -> int:
    """Splits per (batch row, KV head, tile of rows), of which there are `programs`, over a cache of `capacity` keys.

    The result is the smallest number that fills the SMs nearly as well as the best one, since every split adds a part
    to combine. Programs run in waves of programs_per_sm per SM, and the last wave takes as long as a full one.
    """
    slots = sms * programs_per_sm
    most = max(1, min(-(-capacity // LEAST_KEYS), MOST_SPLITS, -(-4 * slots // programs)))
    filled = [programs * n / slots / -(-programs * n // slots) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(filled, start=1) if share >= 0.95 * max(filled))


# -- device code


@triton.jit
def decode_kernel(
    q, q_stride_b, q_stride_s, q_stride_h,
    k, k_stride_b, k_stride_s, k_stride_h,
    v, v_stride_b, v_stride_s, v_stride_h,
    out, out_stride_n, lse, lse_stride_n,
    start, end, interval_stride_b,
    queries, keys, heads_kv, splits, tiles, c, cap_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, CAPPED: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """One split of one KV head for a tile of rows: row r is query r // GROUP, head r % GROUP of the group.

    out [splits, B, Sq, Hq, DV] and lse [splits, B, Hq, Sq] are fp32 and contiguous. A split without keys writes only
    lse.
    """
    program = tl.program_id(0)
    tile = program % tiles
    split = program // tiles % splits
    head_kv = program // (tiles * splits) % heads_kv
    batch = program // (tiles * splits) // heads_kv

    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query = rows // GROUP
    head = head_kv * GROUP + rows % GROUP
    valid = rows < queries * GROUP
    columns = tl.arange(0, BLOCK_D)
    q += batch.to(tl.int64) * q_stride_b + query.to(tl.int64)[:, None] * q_stride_s
    q_tile = tl.load(  # in flight together with the bounds
        q + head.to(tl.int64)[:, None] * q_stride_h + columns[None, :], valid[:, None] & (columns < D)[None, :], 0.0
    )
    bounds = batch.to(tl.int64) * interval_stride_b + query
    row_start = tl.maximum(tl.load(start + bounds, valid, 0), 0)
    row_end = tl.maximum(tl.minimum(tl.load(end + bounds, valid, 0), keys), row_start)

    # The tile's run of keys, and this split's share of it in whole tiles.
    some = row_start < row_end
    lo = tl.min(tl.where(some, row_start, keys), 0)
    hi = tl.max(tl.where(some, row_end, 0), 0)
    share = tl.maximum(tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), splits), BLOCK_K) * BLOCK_K, LEAST)
    first = lo + split * share
    last = tl.minimum(first + share, hi)

    lse += split.to(tl.int64) * lse_stride_n + (batch.to(tl.int64) * heads_kv * GROUP + head) * queries + query
    if first >= last:
        tl.store(lse, tl.full([BLOCK_Q], NEG_INF, tl.float32), valid)
        return

    k = (k, k_stride_b, k_stride_s, k_stride_h, last)
    v = (v, v_stride_b, v_stride_s, v_stride_h, last)
    m = tl.full([BLOCK_Q], NEG_INF, tl.float32)
    z = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    for key in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        k_tile = load_tile(k, batch, head_kv, key, BLOCK_K, BLOCK_D, D, False)
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        if CAPPED:
            s, _ = softcap(s, cap_scale)
        s = tl.where(visible(row_start, row_end, key + tl.arange(0, BLOCK_K)), s, NEG_INF)
        p, m, z, alpha = softmax_step(s, m, z, c, EDGE=True)
        v_tile = load_tile(v, batch, head_kv, key, BLOCK_K, BLOCK_DV, DV, False)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")

    row_lse, z = softmax_end(m, z)
    tl.store(lse, row_lse, valid)
    columns = tl.arange(0, BLOCK_DV)
    out += split.to(tl.int64) * out_stride_n
    out += ((batch.to(tl.int64) * queries + query) * heads_kv * GROUP + head)[:, None] * DV + columns[None, :]
    tl.store(out, acc / z[:, None], valid[:, None] & (columns < DV)[None, :])


@triton.jit
def combine_kernel(
    parts, parts_stride_n, parts_stride_b, parts_stride_s, parts_stride_h,
    lses, lses_stride_n, lses_stride_b, lses_stride_h, lses_stride_s,
    sink, out, lse,
    count, queries, heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """One row of one head: a softmax over its parts, BLOCK_N at a time, with scores lse and values out."""
    program = tl.program_id(0)
    head = program % heads
    query = program // heads % queries
    batch = (program // heads // queries).to(tl.int64)
    parts += batch * parts_stride_b + query.to(tl.int64) * parts_stride_s + head.to(tl.int64) * parts_stride_h
    lses += batch * lses_stride_b + query.to(tl.int64) * lses_stride_s + head.to(tl.int64) * lses_stride_h
    columns = tl.arange(0, BLOCK_DV)
    m = tl.full([1], NEG_INF, tl.float32)
    z = tl.zeros([1], tl.float32)
    if SINK:  # one more part, of value 0
        m = tl.load(sink + head + tl.arange(0, 1)).to(tl.float32) * LOG2_E_
        z = tl.where(m == NEG_INF, 0.0, 1.0)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in tl.range(0, count, BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        part = tl.load(  # both loads at once
            parts + n[:, None] * parts_stride_n + columns[None, :], (n < count)[:, None] & (columns < DV)[None, :], 0.0
        )
        score = tl.load(lses + n * lses_stride_n, n < count, NEG_INF) * LOG2_E_
        m_new = tl.maximum(m, tl.max(score, 0))
        shift = tl.where(m_new == NEG_INF, 0.0, m_new)  # -inf - -inf would be NaN
        weight, alpha = tl.math.exp2(score - shift), tl.math.exp2(m - shift)
        part = tl.where((score != NEG_INF)[:, None], part, 0.0)  # a part without keys has no out
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        z = z * alpha + tl.sum(weight, 0)
        m = m_new
    row = (batch * heads + head) * queries + query + tl.arange(0, 1)
    row_lse, z = softmax_end(m, z)
    tl.store(lse + row, row_lse)
    out += ((batch * queries + query) * heads + head) * DV + columns
    tl.store(out, (acc / z).to(out.dtype.element_ty), columns < DV)


# -- launch


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: tuple[tuple[Tensor, Tensor], ...],
    *,
    scale: float,
    softcap: float | None,
    tuning: Tuning | None = None,
    splits: int | None = None,
) -> Partial:
    """Parts of attention over the union of spans, for `combine`: out [N, B, Sq, Hq, Dv], lse [N, B, Hq, Sq], fp32.

    Arguments are those of `ringflash.kernels.decode.parts`, already checked. tuning and splits replace the tables'
    choices.
    """
    B, Sq, Hq, D = q.shape
    _, capacity, Hkv, DV = v.shape
    rows = Sq * (Hq // Hkv)
    t = tuning or tuning_for(max(D, DV), q.dtype, rows, arch(q))
    tiles = triton.cdiv(rows, t.block_q)
    splits = splits or splits_for(capacity, B * Hkv * tiles, sm_count(q.device), programs_per_sm(t, max(D, DV)))
    out = torch.empty(len(spans) * splits, B, Sq, Hq, DV, dtype=torch.float32, device=q.device)
    lse = torch.empty(len(spans) * splits, B, Hq, Sq, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        for i, (start, end) in enumerate(spans):
            of_span = slice(i * splits, (i + 1) * splits)
            decode_kernel[(B * Hkv * splits * tiles,)](
                *(q, *q.stride()[:3]), *(k, *k.stride()[:3]), *(v, *v.stride()[:3]),
                *(out[of_span], out.stride(0), lse[of_span], lse.stride(0)),
                *(start, end, interval_stride(start)),
                *(Sq, capacity, Hkv, splits, tiles, *score_scales(scale, softcap)),
                GROUP=Hq // Hkv, D=D, BLOCK_D=triton.next_power_of_2(D), DV=DV, BLOCK_DV=triton.next_power_of_2(DV),
                BLOCK_Q=t.block_q, BLOCK_K=t.block_k, STAGES=t.stages, CAPPED=softcap is not None, LEAST=LEAST_KEYS,
                num_warps=t.warps, num_stages=t.stages,
            )  # fmt: skip
    return Partial(out, lse)


def combine(parts: Partial, sink: Tensor | None, out_dtype: torch.dtype) -> Partial:
    """Attention over the keys of all parts. See `ringflash.kernels.decode.combine`."""
    count, B, Sq, Hq, DV = parts.out.shape
    out = torch.empty(B, Sq, Hq, DV, dtype=out_dtype, device=parts.out.device)
    lse = torch.empty(B, Hq, Sq, dtype=torch.float32, device=parts.out.device)
    block = min(PARTS, triton.next_power_of_2(count))
    with torch.cuda.device_of(out):
        combine_kernel[(B * Sq * Hq,)](
            *(parts.out, *parts.out.stride()[:4]), *(parts.lse, *parts.lse.stride()),
            *(lse if sink is None else sink, out, lse), *(count, Sq, Hq),
            DV=DV, BLOCK_DV=triton.next_power_of_2(DV), BLOCK_N=block, SINK=sink is not None,
            num_warps=4 if block > 4 else 1,
        )  # fmt: skip
    return Partial(out, lse)


def supports(q: Tensor, k: Tensor, softcap: float | None, value_dim: int | None = None) -> str | None:
    """None, or the reason for refusing: the tail of "kernel=portable ...". Strides need not suit the copy engine."""
    return input_refusal(q, k, softcap, value_dim) or stride_refusal(q, k, copy_engine=False)


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device: on a GPU, or in Triton's interpreter."""
    return device.type == "cuda" or not isinstance(combine_kernel, triton.JITFunction)
