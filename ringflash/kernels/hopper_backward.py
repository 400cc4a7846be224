"""Attention backward for Hopper (sm_90), in Gluon: one kernel over KV tiles, five products per tile.

The mathematics is that of `portable_backward`: with p = 2^(c s - log2(e) lse) and delta = rowsum(dout * out),

    dp = dout v^T    ds = p (dp - delta)    dq += scale ds k    dk += scale ds^T q    dv += p^T dout

One program holds a tile of keys of one KV head. It loops over the queries query_start:query_end that see them, 64 or
128 at a time, for each query head of the group or for some of them (`programs_per_group`, `divided_programs`). dq has
many writers; dk and dv have several if a group is divided. They are added in L2 by the copy engine's fp32 reduction,
whose order differs from run to run. If no group is divided and the caller has no other queries, dk and dv are written
in 16 bits.
`deterministic=True` calls `portable_backward`, which has one writer per gradient and seven products instead of five.

Two consumers, one warpgroup each, divide the products: by keys at head_dim 64 and 128 (`hopper_backward_64`,
`hopper_backward_128`), and by gradients at 256 (`hopper_backward_256`). The producer, one warp, loads q, dout and the
rows of lse and delta. At 256, two more warps, the reducers, add dq to memory. s, dp, p and ds are computed transposed,
[keys, queries]. Rows that see nothing have lse = -inf, which is treated as inf, so that p is 0.

From head_dim 128 on, dq is summed up in an order of columns in which consumers store it fastest, at 128 without its
scale (`round_dq`).

Query tiles are processed from last to first. Under a causal mask, all programs then start at the end of the sequence
and read the same tiles at the same time, from L2.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflash.intervals import Intervals
from ringflash.kernels import hopper_backward_64, hopper_backward_128, hopper_backward_256, portable_backward
from ringflash.kernels.checks import check_center, check_key_gradients
from ringflash.kernels.hopper_backward_parts import Call
from ringflash.kernels.hopper_parts import (
    L2_BYTES,
    REGISTERS,
    ROWS,
    check_addresses,
    check_inputs,
    check_rows,
    tiles,
)
from ringflash.kernels.portable_backward import ROUND_ROWS, center, delta, round_into, warps_of_whole_rows
from ringflash.kernels.portable_parts import LOG2_E, interval_stride, score_scales, sm_count

__all__ = ["backward", "center", "delta", "round_dq", "round_into"]


@dataclass(frozen=True)
class Tuning:
    """Tile sizes of the launch."""

    block_q: int  # queries per step
    stages: int  # query tiles, and tiles of dout, in shared memory: at most 3

    def __post_init__(self) -> None:
        if self.block_q not in (64, 128):
            raise ValueError(f"block_q must be 64 or 128, got {self.block_q}")
        if self.stages not in (2, 3):
            raise ValueError(f"stages must be 2 or 3, got {self.stages}")


# With 2 stages of 64 queries, a consumer waits for the copy engine in every step: the copy of a tile starts when the
# tile two before it is released, and the tile is needed half a step later. With 128 queries, the time suffices.
TUNINGS = {
    # dk and dv take 64 registers per thread, s and dp 128. 194 of 227 KB.
    64: Tuning(block_q=128, stages=2),
    # dk and dv take 128 registers per thread, s and dp 64, of 240 with two consumers. 226 of 227 KB.
    128: Tuning(block_q=64, stages=3),
    # The stages are those of q; dout has one.
    256: Tuning(block_q=64, stages=2),
}
# The most query heads per program. With 8, programs drift apart, and their q, dout and dq no longer fit L2 together: 64
# query and 8 KV heads at 64k tokens have 554 TFLOP/s with 8 and 576 with 4. Instead of 7, 1 gains 5 percent or loses 2,
# depending on the mask.
HEADS = 7
# The longest program's time as a fraction of the calls' from which all heads are processed at a time.
LONGEST = 0.3


@gluon.jit
def consume(call, shared, descriptors, WHO: gl.constexpr):
    """A consumer: one warpgroup."""
    if call.D == 64:
        hopper_backward_64.consume(call, shared, descriptors, WHO)
    elif call.D == 128:
        hopper_backward_128.consume(call, shared, descriptors, WHO)
    else:
        hopper_backward_256.consume(call, shared, descriptors, WHO)


@gluon.jit
def produce(call, shared, descriptors):
    """The producer: one warp, which loads what the consumers read."""
    if call.D <= 128:
        hopper_backward_128.produce(call, shared, descriptors)
    else:
        hopper_backward_256.produce(call, shared, descriptors)


@gluon.jit(do_not_specialize=[
    "lse_stride_b", "lse_stride_h", "delta_stride_b", "delta_stride_h", "interval_stride_b", "order_stride_b",
    "center_stride_b", "center_stride_h", "tiles", "queries", "keys", "heads_kv", "group", "split", "batch_heads",
    "heads_in_l2", "whole", "scale", "c", "cap_scale", "lse_factor",
])  # fmt: skip
def backward_kernel(
    q, k, v, dout, dq, dk, dv,
    lse, lse_stride_b, lse_stride_h,
    delta, delta_stride_b, delta_stride_h,
    start, end, interval_stride_b, order, order_stride_b, center, center_stride_b, center_stride_h, tiles,
    queries, keys, heads_kv, group, split, batch_heads, heads_in_l2, whole, scale, c, cap_scale, lse_factor,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, CAPPED: gl.constexpr, CENTERED: gl.constexpr,
):  # fmt: skip
    """Allocate shared memory, and start each group of warps. All tensors are [B, H, S, D] for TMA."""
    undivided = batch_heads if D == 64 else whole  # at 64, whole is None
    call = Call(
        lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, start, end, interval_stride_b,
        order, order_stride_b, center, center_stride_b, center_stride_h, tiles, queries, keys, heads_kv, group, split,
        batch_heads, heads_in_l2, undivided, scale, c, cap_scale, lse_factor, D, BLOCK_Q,
        2 * ROWS if D <= 128 else ROWS, CAPPED, CENTERED,
    )  # fmt: skip
    descriptors = (q, k, v, dout, dq, dk, dv)
    if D == 64:
        shared = hopper_backward_64.make_shared(q.dtype, D, BLOCK_Q, STAGES)
    elif D == 128:
        shared = hopper_backward_128.make_shared(q.dtype, D, BLOCK_Q, STAGES)
    else:
        shared = hopper_backward_256.make_shared(q.dtype, D, BLOCK_Q, STAGES)
    if D <= 128:
        gl.warp_specialize(
            [
                (consume, (call, shared, descriptors, 0)),
                (consume, (call, shared, descriptors, 1)),
                (produce, (call, shared, descriptors)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (call, shared, descriptors, 0)),
                (consume, (call, shared, descriptors, 1)),
                (produce, (call, shared, descriptors)),
                (hopper_backward_256.reduce, (call, shared, descriptors, 0)),
                (hopper_backward_256.reduce, (call, shared, descriptors, 1)),
            ],
            [4, 1, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )


# -- dq in the inputs' dtype


@triton.jit(do_not_specialize=["rows"])
def round_dq_kernel(
    x, x_stride_b, x_stride_s, x_stride_h,
    out, out_stride_b, out_stride_s, out_stride_h,
    rows, heads, scale,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = scale x for BLOCK rows of one head, where x has columns 0 2 4 6 1 3 5 7 of every 8 in this order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    row_ = row.to(tl.int64)[:, None]
    half = tl.arange(0, D // 2)
    x += batch * x_stride_b + head * x_stride_h + row_ * x_stride_s + (half // 4 * 8 + half % 4)[None, :]
    even = tl.load(x, (row < rows)[:, None], 0.0)
    odd = tl.load(x + 4, (row < rows)[:, None], 0.0)
    tile = tl.join(even, odd).reshape([BLOCK, D]) * scale
    out += batch * out_stride_b + head * out_stride_h + row_ * out_stride_s + tl.arange(0, D)[None, :]
    tl.store(out, tile.to(out.dtype.element_ty), (row < rows)[:, None])


def round_dq(out: Tensor, dq: Tensor, *, scale: float) -> None:
    """out = the gradient that `backward` has summed up in dq, both [B, S, H, D]; out is in 16 bits or fp32.

    At head_dim 64, dq is the gradient. From 128 on, its columns are in another order, and at 128 it lacks the scale.
    """
    B, S, H, D = dq.shape
    if D == 64:
        round_into(out, dq)
        return
    if 0 in dq.shape:
        return
    with torch.cuda.device_of(dq):
        round_dq_kernel[(triton.cdiv(S, ROUND_ROWS), B * H)](
            *(dq, *dq.stride()[:3]), *(out, *out.stride()[:3]), *(S, H, scale if D == 128 else 1.0),
            D=D, BLOCK=ROUND_ROWS, num_warps=warps_of_whole_rows(D),
        )  # fmt: skip


# -- launch


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
    deterministic: bool = False,
) -> None:
    """Add this block's gradients to dq, dk and dv, or write dk and dv. See `ringflash.kernels` for the contract.

    The order of additions differs from run to run; with deterministic=True, `portable_backward` computes all three
    gradients, bit-equal from run to run. Raises ValueError, with the values, if `hopper_parts.supports` refuses, if a
    tensor does not fit q and k, or if scale is not positive.
    """
    if deterministic:
        portable_backward.backward(
            dout, q, k, v, lse, delta, intervals, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv, center=center
        )
        return
    check_inputs(q, k, scale, softcap, intervals, v=v, dout=dout)
    check_rows(q, lse=lse, delta=delta, dq=dq)
    check_key_gradients("hopper", k, v, dk, dv)
    check_addresses(dk=dk, dv=dv)
    check_center("hopper", k, center)
    B, Sq, Hq, D = q.shape
    _, Skv, Hkv, _ = k.shape
    rows = ROWS.value
    t, registers = TUNINGS[D], REGISTERS[2]
    order, results = intervals.key_order[2 * rows], (dk, dv)
    written = dk.dtype != torch.float32
    if 0 in q.shape or 0 in k.shape or not order.nonempty:
        if written:
            torch._foreach_zero_(results)
        return
    parts = 1 if D <= 128 else 2
    keys = 2 * rows // parts  # per program
    longest = order.longest / order.total / parts  # of a head's tiles, as a fraction of all
    on_each = calls * B * Hkv / sm_count(q.device)  # heads' work per SM
    split = programs_per_group(Hq // Hkv, longest, on_each)
    # Tiles that no query sees have nothing to add, but zeros to write.
    count = order.nonempty if dk.dtype == torch.float32 else order.tiles.shape[1]
    each = Hq // Hkv // split  # query heads of a program
    programs = B * Hkv * split * count
    equal = order.longest * order.nonempty == order.total
    # At head_dim 64, the kernel's lines for this made every step slower.
    divided = 0 if D == 64 else divided_programs(programs, each, equal, sm_count(q.device) // parts)
    several = split > 1 or divided > 0  # programs add to a tile
    if written and several:
        dk, dv = torch.zeros(2, *k.shape, dtype=torch.float32, device=k.device)
    of_center = (k, 0, 0) if center is None else (center, center.stride(0), center.stride(2))  # not read without one
    with torch.cuda.device_of(q):
        backward_kernel[(parts * (programs + divided * (each - 1)),)](
            *(tiles(q, t.block_q), tiles(k, keys), tiles(v, keys), tiles(dout, t.block_q)),
            *(tiles(dq, rows, 64), tiles(dk, rows), tiles(dv, rows)),
            *(lse, *lse.stride()[:2]),
            *(delta, *delta.stride()[:2]),
            *(intervals.query_start, intervals.query_end, interval_stride(intervals.query_start)),
            *(order.tiles, interval_stride(order.tiles), *of_center, count),
            *(Sq, Skv, Hkv, Hq // Hkv, split, B * Hkv, heads_at_a_time(q, k, longest / split / on_each)),
            *(None if D == 64 else programs - divided, scale, *score_scales(scale, softcap), -LOG2_E),
            D=D, BLOCK_Q=t.block_q, STAGES=t.stages,
            CONSUMER_REGISTERS=registers.consumer, PRODUCER_REGISTERS=registers.producer,
            CAPPED=softcap is not None, CENTERED=center is not None,
            num_warps=4, maxnreg=registers.launch, enable_fp_fusion=True,
        )  # fmt: skip
    if written and several:
        for result, x in zip(results, (dk, dv), strict=True):
            round_into(result, x)


def programs_per_group(group: int, longest: float, on_each: float) -> int:
    """The number of programs among which the query heads of a KV tile are divided.

    A program has at most HEADS of them, and fewer if tiles would otherwise finish unevenly. longest: a head's longest
    tile as a fraction of all its tiles; on_each: how many heads' tiles each SM processes, on average, in all calls that
    run at the same time. Dividing costs each program the copies of k, v, dk and dv, about 3 steps.
    """
    split = next(n for n in range(1, group + 1) if group % n == 0 and group // n <= HEADS)
    while group % (2 * split) == 0 and longest / split > 0.9 * on_each:
        split *= 2
    return split


def divided_programs(programs: int, heads: int, equal: bool, at_a_time: int) -> int:
    """How many programs, the last ones, are replaced by one program per query head.

    If all tiles are equal, as under a full mask, a last wave of few programs takes as long as any other. Divided, it
    takes a fraction. heads: query heads per program; at_a_time: programs that run at the same time.
    """
    last = programs % at_a_time
    return last if equal and math.ceil(last * heads / at_a_time) < heads else 0


def heads_at_a_time(q: Tensor, k: Tensor, longest: float) -> int:
    """The number of KV heads, over batch rows, that are processed at a time, the longest tiles of all of them first.

    These are as many as keep q, dout and fp32 dq in L2. But if the longest program takes more than LONGEST of the time
    of all calls, the last head's would run alone at the end, and these are all heads. longest: that fraction.
    """
    B, Sq, Hq, D = q.shape
    batch_heads = B * k.shape[2]
    in_l2 = L2_BYTES // (Hq // k.shape[2] * Sq * D * (2 * q.element_size() + 4))
    return batch_heads if longest > LONGEST else min(max(1, in_l2), batch_heads)
