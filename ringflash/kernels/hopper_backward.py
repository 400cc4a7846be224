"""Attention backward for Hopper (sm_90), in Gluon: one kernel over KV tiles, five products per tile.

The mathematics is that of `portable_backward`: with p = 2^(c s - log2(e) lse) and delta = rowsum(dout * out),

    dp = dout v^T    ds = p (dp - delta)    dq += scale ds k    dk += scale ds^T q    dv += p^T dout

One program holds a tile of keys of one KV head. It loops over the queries query_start:query_end that see them, 64 or
128 at a time, for each query head of the group or for some of them (`programs_per_group`). dq has many writers; dk and
dv have several if a group is divided. They are added in L2 by the copy engine's fp32 reduction, whose order differs
from run to run. If a group is not divided and the caller has no other queries, its dk and dv are written in 16 bits.
`deterministic=True` calls `portable_backward`, which has one writer per gradient and seven products instead of five.

Two consumers, one warpgroup each, divide the products: by keys at head_dim 64 and 128 (`hopper_backward_64`,
`hopper_backward_128`), and by gradients at 256 (`hopper_backward_256`). The producer, one warp, loads q, dout and the
rows of lse and delta. s, dp, p and ds are computed transposed, [keys, queries]. From head_dim 128 on, the accumulator
of the scores starts at -lse / scale. The exponential of a score is then p, and no consumer needs 16 registers for lse.
Rows that see nothing have lse = -inf, which is treated as inf, so that p is 0.

Query tiles are processed from last to first. Under a causal mask, all programs then start at the end of the sequence
and read the same tiles at the same time, from L2.
"""

from dataclasses import dataclass

import torch
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
from ringflash.kernels.portable_backward import center, delta, round_into
from ringflash.kernels.portable_parts import LOG2_E, interval_stride, score_scales, sm_count

__all__ = ["backward", "center", "delta", "round_into"]


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
    "center_stride_b", "center_stride_h", "tiles", "queries", "keys", "heads_kv", "group", "split", "pairs",
    "heads_in_l2", "scale", "c", "cap_scale", "lse_factor",
])  # fmt: skip
def backward_kernel(
    q, k, v, dout, dq, dk, dv,
    lse, lse_stride_b, lse_stride_h,
    delta, delta_stride_b, delta_stride_h,
    start, end, interval_stride_b, order, order_stride_b, center, center_stride_b, center_stride_h, tiles,
    queries, keys, heads_kv, group, split, pairs, heads_in_l2, scale, c, cap_scale, lse_factor,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, CAPPED: gl.constexpr, CENTERED: gl.constexpr,
):  # fmt: skip
    """Allocate shared memory, and start each group of warps. All tensors are [B, H, S, D] for TMA."""
    call = Call(
        lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, start, end, interval_stride_b,
        order, order_stride_b, center, center_stride_b, center_stride_h, tiles, queries, keys, heads_kv, group, split,
        pairs, heads_in_l2, scale, c, cap_scale, lse_factor, D, BLOCK_Q, 2 * ROWS if D <= 128 else ROWS, CAPPED,
        CENTERED,
    )  # fmt: skip
    descriptors = (q, k, v, dout, dq, dk, dv)
    if D == 64:
        shared = hopper_backward_64.make_shared(q.dtype, D, BLOCK_Q, STAGES)
    elif D == 128:
        shared = hopper_backward_128.make_shared(q.dtype, D, BLOCK_Q, STAGES)
    else:
        shared = hopper_backward_256.make_shared(q.dtype, D, BLOCK_Q, STAGES)
    gl.warp_specialize(
        [
            (consume, (call, shared, descriptors, 0)),
            (consume, (call, shared, descriptors, 1)),
            (produce, (call, shared, descriptors)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


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
    deterministic: bool = False,
    tuning: Tuning | None = None,
) -> None:
    """Add this block's gradients to dq, dk and dv, or write dk and dv. See `ringflash.kernels` for the contract.

    The order of additions differs from run to run; with deterministic=True, `portable_backward` computes all three
    gradients, bit-equal from run to run. Raises ValueError, with the values, if `hopper_parts.supports` refuses, if a
    tensor does not fit q and k, if scale is not positive, or if the tuning is not for this head size. tuning replaces
    the table's choice.
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
    t, registers = tuning or TUNINGS[D], REGISTERS[2]
    if t.block_q != TUNINGS[D].block_q:
        raise ValueError(f"kernel=hopper takes block_q={TUNINGS[D].block_q} at head_dim {D}, got {t.block_q}")
    order, results = intervals.key_order[2 * rows], (dk, dv)
    written = dk.dtype != torch.float32
    if 0 in q.shape or 0 in k.shape or not order.nonempty:
        if written:
            torch._foreach_zero_(results)
        return
    parts = 1 if D <= 128 else 2
    keys = 2 * rows // parts  # per program
    split = programs_per_group(Hq // Hkv, order.longest / order.total / parts, B * Hkv, sm_count(q.device))
    if written and split > 1:  # several programs add to a tile
        dk, dv = torch.zeros(2, *k.shape, dtype=torch.float32, device=k.device)
    # Tiles that no query sees have nothing to add, but zeros to write.
    count = order.nonempty if dk.dtype == torch.float32 else order.tiles.shape[1]
    lse_factor = -1 / scale if D > 64 and softcap is None else -LOG2_E
    of_center = (k, 0, 0) if center is None else (center, center.stride(0), center.stride(2))  # not read without one
    with torch.cuda.device_of(q):
        backward_kernel[(parts * B * Hkv * split * count,)](
            *(tiles(q, t.block_q), tiles(k, keys), tiles(v, keys), tiles(dout, t.block_q)),
            *(tiles(dq, rows, 64), tiles(dk, rows), tiles(dv, rows)),
            *(lse, *lse.stride()[:2]),
            *(delta, *delta.stride()[:2]),
            *(intervals.query_start, intervals.query_end, interval_stride(intervals.query_start)),
            *(order.tiles, interval_stride(order.tiles), *of_center, count),
            *(Sq, Skv, Hkv, Hq // Hkv, split, B * Hkv, min(heads_in_l2(q, k), B * Hkv), scale),
            *(*score_scales(scale, softcap), lse_factor),
            D=D, BLOCK_Q=t.block_q, STAGES=t.stages,
            CONSUMER_REGISTERS=registers.consumer, PRODUCER_REGISTERS=registers.producer,
            CAPPED=softcap is not None, CENTERED=center is not None,
            num_warps=4, maxnreg=registers.launch, enable_fp_fusion=True,
        )  # fmt: skip
    if written and split > 1:
        for result, x in zip(results, (dk, dv), strict=True):
            round_into(result, x)


def programs_per_group(group: int, longest: float, pairs: int, sms: int) -> int:
    """The number of programs among which the query heads of a KV tile are divided.

    A program has at most HEADS of them, and fewer if tiles would otherwise finish unevenly. longest: a head's longest
    tile as a fraction of all its tiles; pairs: batch rows x KV heads. Dividing costs each program the copies of k, v,
    dk and dv, about 3 steps.
    """
    split = next(n for n in range(1, group + 1) if group % n == 0 and group // n <= HEADS)
    while group % (2 * split) == 0 and longest / split > 0.9 * pairs / sms:
        split *= 2
    return split


def heads_in_l2(q: Tensor, k: Tensor) -> int:
    """The number of (batch row, KV head) pairs at a time whose q, dout and fp32 dq stay in L2."""
    _, Sq, Hq, D = q.shape
    return max(1, L2_BYTES // (Hq // k.shape[2] * Sq * D * (2 * q.element_size() + 4)))
