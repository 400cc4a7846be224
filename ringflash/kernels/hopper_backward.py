"""Attention backward for Hopper (sm_90), in Gluon: one kernel over KV tiles, five products per tile.

The mathematics is that of `portable_backward`: with p = 2^(c s - log2(e) lse) and delta = rowsum(dout * out),

    dp = dout v^T    ds = p (dp - delta)    dq += scale ds k    dk += scale ds^T q    dv += p^T dout

This is the kernel for head_dim 64 and 128, and the launch for all; 256 has its own kernel in `hopper_backward_256`.

One program holds 128 keys of one KV head and walks the queries query_start:query_end that see them, 64 at a time, for
each query head of the group, or for some of them (`programs_a_group`). dq has
many writers, dk and dv then some; they add by the copy engine's fp32 reduction in L2, whose order differs from run to
run. `deterministic=True` calls `portable_backward`, with one writer for each and seven products instead of
five.

Two consumers own 64 keys each and compute s, dp, p and ds transposed, [keys, queries]. dq is a sum over all keys:
each publishes its ds in shared memory and computes half of dq's columns over both. It does so a step late, in the
middle of the next one, when the other's ds has long been there: the consumers drift apart by up to half a step, and
one's products run under the other's exponentials. Scores begin as -lse / scale, so that their power of two is p:
the product adds for nothing what would cost each consumer 16 registers and an addition. Rows that see nothing
(lse = -inf) count as lse = inf: p is 0. The producer, one warp, brings q, dout and the rows of lse and delta.

Queries are walked from the last tile back. Under a causal mask all programs then begin at the sequence's end, so that
they read the same tiles at a time, from L2.

What waits for what, in step 2 of a consumer; ds1 is of the step before, both consumers':

    copy engine      q3, dout3                                                                 dq1 +=
    tensor cores     s2 = k q2^T . dp2 = v dout2^T | dv += p2 dout2 . dq1 = ds1 k       . dk += ds2 q2
    consumer                       p2 = 2^(c s2)   | ds2 = p2 (dp2 - delta)             | dq1, ds2 to shared memory
"""

# Annotations stay objects in this file (no `from __future__ import annotations`): Triton reads those of aggregates.
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringflash.kernels import portable_backward
from ringflash.kernels.checks import check_center
from ringflash.kernels.gluon_names import add_out, aggregate, copy_in, reinterpret
from ringflash.kernels.hopper_backward_256 import backward_kernel as backward_kernel_256
from ringflash.kernels.hopper_backward_parts import Call, stage_dq
from ringflash.kernels.hopper_parts import (
    FIRST_BARRIER,
    L2_BYTES,
    NEG_INF,
    REGISTERS,
    ROWS,
    Pipe,
    arrive,
    check_inputs,
    check_rows,
    make_pipe,
    mask_scores,
    processors,
    softcap,
    sync,
    tiles,
)
from ringflash.kernels.portable_backward import center, delta, round_into
from ringflash.kernels.portable_compensation import subtract
from ringflash.kernels.portable_parts import LOG2_E, interval_stride, score_scales
from ringflash.mask import Intervals

__all__ = ["backward", "center", "delta", "round_into"]

PUBLISHED = gl.constexpr(FIRST_BARRIER)  # 4: ds of each consumer, of even steps and of odd ones
EMPTY = gl.constexpr(FIRST_BARRIER + 4)  # as many as there are stages, at most 3
DONE = gl.constexpr(FIRST_BARRIER + 7)


@dataclass(frozen=True)
class Tuning:
    """How the launch is cut up: two consumers with 64 keys each."""

    block_q: int  # queries of a step
    stages: int  # query tiles, and tiles of dout, in shared memory: at most 3

    def __post_init__(self) -> None:
        if self.block_q not in (64, 128):
            raise ValueError(f"block_q must be 64 or 128, got {self.block_q}")
        if self.stages not in (2, 3):
            raise ValueError(f"stages must be 2 or 3, got {self.stages}")


# With 2 stages a consumer waits for the copy engine in every step: a tile is ordered when the one two before it has
# been used up, and needed half a step later.
TUNINGS = {
    64: Tuning(block_q=64, stages=3),
    # dk and dv take 128 registers per thread, s and dp 64: two consumers' 240 is what there is. 226 of 227 KB.
    128: Tuning(block_q=64, stages=3),
    # `hopper_backward_256`: stages of q; dout has one.
    256: Tuning(block_q=64, stages=2),
}
# Query heads of a program. With 8, programs drift apart, and their q, dout and dq no longer lie in L2 together: 64
# query and 8 KV heads, 64k tokens: 8 heads 554 TFLOP/s, 4 576. With 7 the mask decides: 1 gains 5 percent or loses 2.
HEADS = 7


@aggregate
class Shared:
    """Everything in shared memory. k and v: tiles 0, 1 and 2, 3 of kv, filled once.

    A stage is a query tile, its dout and their rows of lse and delta; number n lies in slot n % DEPTH. It is full when
    the copy engine's bytes have landed and the producer's rows are written, empty when both consumers have said so.
    """

    kv: Pipe
    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor  # lse_factor lse, -inf where a row sees nothing
    delta: gl.shared_memory_descriptor  # -delta
    full: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor  # two steps of one tile per consumer, [keys, queries]
    dq: gl.shared_memory_descriptor  # one tile per consumer: half of the columns
    DEPTH: gl.constexpr

    @gluon.jit
    def wait_full(self, number, pred=True):
        """Wait for a stage to be filled."""
        mbarrier.wait(self.full.index(number % self.DEPTH), number // self.DEPTH & 1, pred=pred)


# -- the producer: one warp


@gluon.jit
def produce(call, shared, descriptors):
    """Order every copy, as far ahead as there are empty slots, and bring lse and delta. Waits for consumers only."""
    q, k, v, dout = descriptors[0], descriptors[1], descriptors[2], descriptors[3]
    job = call.job()
    lse = call.lse + job.batch.to(gl.int64) * call.lse_stride_b
    delta = call.delta + job.batch.to(gl.int64) * call.delta_stride_b
    index = gl.arange(0, call.BLOCK_Q, layout=gl.BlockedLayout([call.BLOCK_Q // 32], [32], [1], [0]))
    if job.tiles > 0:
        for who in gl.static_range(2):
            shared.kv.load(who, k, job.batch, job.head_kv, job.first_row + who * ROWS)
        for who in gl.static_range(2):
            shared.kv.load(2 + who, v, job.batch, job.head_kv, job.first_row + who * ROWS)
    number = 0
    for member in range(call.heads()):
        head = job.head + member
        head_lse = lse + head.to(gl.int64) * call.lse_stride_h
        head_delta = delta + head.to(gl.int64) * call.delta_stride_h
        for step in range(job.tiles):
            row = call.row(job, step)
            rows = row + index
            row_lse = gl.load(head_lse + rows, rows < call.queries, NEG_INF)
            row_delta = gl.load(head_delta + rows, rows < call.queries, 0.0)
            slot = number % shared.DEPTH
            if number >= shared.DEPTH:
                sync(EMPTY + slot, 288, 1)  # both consumers
            full = shared.full.index(slot)
            mbarrier.expect(full, q.block_type.nbytes + dout.block_type.nbytes)
            copy_in(q, [job.batch, head, row, 0], full, shared.q.index(slot))
            copy_in(dout, [job.batch, head, row, 0], full, shared.dout.index(slot))
            shared.lse.index(slot).store(gl.where(row_lse == NEG_INF, NEG_INF, row_lse * call.lse_factor))
            shared.delta.index(slot).store(-row_delta)
            mbarrier.arrive(full, count=1)
            number += 1


# -- the consumers: a warpgroup each


@gluon.jit
def begin_dq(shared, number, call, WHO: gl.constexpr):
    """This consumer's half of dq's columns of the step before, over both consumers' keys: two products in flight."""
    HALF: gl.constexpr = call.D // 2
    Q: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    slot = number % 2
    zeros = gl.zeros([call.BLOCK_Q, HALF], gl.float32, Q)
    sync(PUBLISHED + 2 * (1 - WHO) + slot, 256, 4)  # the other consumer
    k_0 = shared.kv.tile(0).slice(WHO * HALF, HALF, 1)
    k_1 = shared.kv.tile(1).slice(WHO * HALF, HALF, 1)
    half = warpgroup_mma(shared.ds.index(2 * slot).permute((1, 0)), k_0, zeros, use_acc=False, is_async=True)
    return warpgroup_mma(shared.ds.index(2 * slot + 1).permute((1, 0)), k_1, half, is_async=True)


@gluon.jit
def publish(ds, shared, number, WHO: gl.constexpr):
    """This consumer's ds into shared memory, for both consumers' dq, who may read it once it is fenced and announced.

    The slot is empty: its last reader was the other's dq of two steps before, which was done before the other
    published what this consumer has waited for since.
    """
    shared.ds.index(2 * (number % 2) + WHO).store(ds)


@gluon.jit
def announce(number, WHO: gl.constexpr):
    """Tell the other consumer that ds is there, after the fence."""
    arrive(PUBLISHED + 2 * WHO + number % 2, 256)


@gluon.jit
def step(
    dk, dv, dq_head, dq_row, shared, number, more, batch, head, row, key_start, key_end, dq, call,
    WHO: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Scores, dk and dv of query tile `number` with this consumer's keys, and dq of the one before it.

    dv begins before the wait for dp: a product that needs p is what keeps ptxas from moving the exponentials below that
    wait, where nothing would run under them. more: whether another tile follows.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, call.BLOCK_Q, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dk.type.layout, k_width=2)
    slot = number % shared.DEPTH
    q_tile = shared.q.index(slot)
    dout_tile = shared.dout.index(slot)
    zeros = gl.zeros([ROWS, call.BLOCK_Q], gl.float32, S)

    lse = gl.expand_dims(shared.lse.index(slot).load(gl.SliceLayout(0, S)), 0)
    begin = zeros if call.CAPPED else gl.broadcast(lse, zeros)[0]
    scores = warpgroup_mma(shared.kv.tile(WHO), q_tile.permute((1, 0)), begin, is_async=True)
    dscores = warpgroup_mma(shared.kv.tile(2 + WHO), dout_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(scores,))  # the tensor cores, for the older of two products
    slope = 1.0
    if call.CAPPED:
        s = softcap(s, call.cap_scale)
        slope = 1.0 - s * s
        p = gl.exp2(s * call.c + lse)
    else:
        p = gl.exp2(s * call.c)
    if EDGE:
        p = mask_scores(p, key_start, key_end, row, "0f00000000")
    weights = gl.convert_layout(p.to(q_tile.dtype), LEFT)
    dv_next = warpgroup_mma(weights, dout_tile, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dscores,))  # the tensor cores, for all but dv
    delta = gl.expand_dims(shared.delta.index(slot).load(gl.SliceLayout(0, S)), 0)
    ds = (p * (dp + delta) * slope).to(q_tile.dtype)
    dq_next = begin_dq(shared, number, call, WHO)
    dk_next = warpgroup_mma(gl.convert_layout(ds, LEFT), q_tile, dk, is_async=True)
    tma.store_wait(0)  # the copy engine, reading dq of the step before out of the same shared memory
    dq_half = warpgroup_mma_wait(1, deps=(dq_next,))  # the tensor cores, for all but dk
    publish(ds, shared, number + 1, WHO)
    stage_dq(dq_half, shared.dq.index(WHO), call.scale)
    fence_async_shared()  # what threads wrote, made visible to tensor cores and copy engine
    announce(number + 1, WHO)
    add_out(dq, [batch, dq_head, dq_row, WHO * (call.D // 2)], shared.dq.index(WHO))
    shared.wait_full(number + 1, more)  # the copy engine and the producer
    dk, dv = warpgroup_mma_wait(0, deps=(dk_next, dv_next))  # the tensor cores
    arrive(EMPTY + slot, 288)
    return dk, dv, head, row


@gluon.jit
def consume(call, shared, descriptors, WHO: gl.constexpr):
    """Keys WHO x 64 and on of this program's KV tile."""
    dq, dk, dv = descriptors[4], descriptors[5], descriptors[6]
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, call.D, 16])
    S: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, call.BLOCK_Q, 16]
    )
    job = call.job()
    if job.tiles > 0:
        start = call.start + job.batch.to(gl.int64) * call.interval_stride_b
        end = call.end + job.batch.to(gl.int64) * call.interval_stride_b
        keys = job.first_row + WHO * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        key_start = gl.load(start + keys, keys < call.keys, 0)
        key_end = gl.load(end + keys, keys < call.keys, 0)
        dk_acc = gl.zeros([ROWS, call.D], gl.float32, A)
        dv_acc = gl.zeros([ROWS, call.D], gl.float32, A)
        full = job.tiles - job.edges
        last = job.tiles * call.heads() - 1
        number = 0
        # Zeros stand for the step before the first; their dq lies past the end, where the copy engine drops it.
        publish(gl.zeros([ROWS, call.BLOCK_Q], descriptors[0].dtype, S), shared, 0, WHO)
        fence_async_shared()
        announce(0, WHO)
        dq_head = job.head
        dq_row = call.queries
        shared.kv.wait_full(0)  # the copy engine; dq takes both halves of k
        shared.kv.wait_full(1)
        shared.kv.wait_full(2 + WHO)
        shared.wait_full(0)
        for member in range(call.heads()):
            head = job.head + member

            # 1. Query tiles that see every key: no mask.
            for i in range(full):
                dk_acc, dv_acc, dq_head, dq_row = step(
                    dk_acc, dv_acc, dq_head, dq_row, shared, number + i, number + i < last, job.batch, head,
                    call.row(job, i), 0, 0, dq, call, WHO, EDGE=False,
                )  # fmt: skip

            # 2. Query tiles that see only some of the keys.
            for i in range(full, job.tiles):
                dk_acc, dv_acc, dq_head, dq_row = step(
                    dk_acc, dv_acc, dq_head, dq_row, shared, number + i, number + i < last, job.batch, head,
                    call.row(job, i), key_start, key_end, dq, call, WHO, EDGE=True,
                )  # fmt: skip
            number += job.tiles

        # 3. dq of the last query tile.
        dq_next = begin_dq(shared, number, call, WHO)
        tma.store_wait(0)
        dq_half = warpgroup_mma_wait(0, deps=(dq_next,))
        stage_dq(dq_half, shared.dq.index(WHO), call.scale)
        fence_async_shared()
        add_out(dq, [job.batch, dq_head, dq_row, WHO * (call.D // 2)], shared.dq.index(WHO))

        # 4. k and v make room for dk and dv in fp32, a tile for each consumer, once neither reads them.
        sync(DONE, 256, 4)  # the other consumer
        row = job.first_row + WHO * ROWS
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, call.D], gl.float32)
        staged = reinterpret(shared.kv.tiles, gl.float32, [2, ROWS, call.D], layout).index(WHO)
        staged.store(dk_acc * call.scale)
        fence_async_shared()
        add_out(dk, [job.batch, job.head_kv, row, 0], staged)
        tma.store_wait(0)  # the copy engine, reading
        staged.store(dv_acc)
        fence_async_shared()
        add_out(dv, [job.batch, job.head_kv, row, 0], staged)
        tma.store_wait(0)


@gluon.jit
def consume_0(call, shared, descriptors):
    """The first consumer."""
    consume(call, shared, descriptors, 0)


@gluon.jit
def consume_1(call, shared, descriptors):
    """The second consumer."""
    consume(call, shared, descriptors, 1)


@gluon.jit(do_not_specialize=[
    "lse_stride_b", "lse_stride_h", "delta_stride_b", "delta_stride_h", "interval_stride_b", "order_stride_b",
    "tiles", "queries", "keys", "heads_kv", "group", "split", "pairs", "heads_in_l2", "scale", "c", "cap_scale",
    "lse_factor",
])  # fmt: skip
def backward_kernel(
    q, k, v, dout, dq, dk, dv,
    lse, lse_stride_b, lse_stride_h,
    delta, delta_stride_b, delta_stride_h,
    start, end, interval_stride_b, order, order_stride_b, tiles,
    queries, keys, heads_kv, group, split, pairs, heads_in_l2, scale, c, cap_scale, lse_factor,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers, and a function for each group of warps. All tensors are [B, H, S, D] for TMA."""
    call = Call(
        lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, start, end, interval_stride_b,
        order, order_stride_b, tiles, queries, keys, heads_kv, group, split, pairs, heads_in_l2, scale, c, cap_scale,
        lse_factor, D, BLOCK_Q, 2 * ROWS, CAPPED,
    )  # fmt: skip
    rows_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_Q], q.dtype)
    dq_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_Q, D // 2], gl.float32)
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_Q, D], q.dtype)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=2)
    shared = Shared(
        make_pipe(q.dtype, 4, ROWS, D),
        gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_Q, D], tile_layout),
        gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_Q, D], tile_layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], rows_layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], rows_layout),
        full,
        gl.allocate_shared_memory(q.dtype, [4, ROWS, BLOCK_Q], ds_layout),
        gl.allocate_shared_memory(gl.float32, [2, BLOCK_Q, D // 2], dq_layout),
        STAGES,
    )
    descriptors = (q, k, v, dout, dq, dk, dv)
    gl.warp_specialize(
        [
            (consume_0, (call, shared, descriptors)),
            (consume_1, (call, shared, descriptors)),
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
    """Add this block's gradients to dq, dk and dv. See `ringflash.kernels` for the contract.

    Sums are taken in an order that differs from run to run; deterministic=True computes all three by
    `portable_backward`, bit-equal from run to run. Raises ValueError, with the values, where `hopper_parts.supports`
    would refuse, where a tensor does not fit q and k, and where scale is not positive. tuning replaces the table's
    choice.
    """
    if deterministic:
        portable_backward.backward(
            dout, q, k, v, lse, delta, intervals, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv, center=center
        )
        return
    check_inputs(q, k, scale, softcap, intervals, v=v, dout=dout)
    check_rows(q, lse=lse, delta=delta, dq=dq)
    check_rows(k, dk=dk, dv=dv)
    check_center("hopper", k, center)
    if 0 in q.shape or 0 in k.shape:
        return
    if center is not None:
        k = subtract(k, center, intervals)
    B, Sq, Hq, D = q.shape
    _, Skv, Hkv, _ = k.shape
    rows = ROWS.value
    t, registers = tuning or TUNINGS[D], REGISTERS[2]
    order = intervals.key_order[2 * rows]
    if not order.nonempty:
        return
    split = programs_a_group(
        Hq // Hkv, order.longest / order.total / (2 if D > 128 else 1), B * Hkv, processors(q.device)
    )
    lse_factor = -1 / scale if softcap is None else -LOG2_E
    kernel, parts = (backward_kernel, 1) if D <= 128 else (backward_kernel_256, 2)
    with torch.cuda.device_of(q):
        kernel[(parts * B * Hkv * split * order.nonempty,)](
            *(tiles(q, t.block_q), tiles(k, rows), tiles(v, rows), tiles(dout, t.block_q)),
            *(tiles(dq, t.block_q, min(64, D // 2)), tiles(dk, rows), tiles(dv, rows)),
            *(lse, *lse.stride()[:2]),
            *(delta, *delta.stride()[:2]),
            *(intervals.query_start, intervals.query_end, interval_stride(intervals.query_start)),
            *(order.tiles, interval_stride(order.tiles), order.nonempty),
            *(Sq, Skv, Hkv, Hq // Hkv, split, B * Hkv, min(heads_in_l2(q, k), B * Hkv), scale),
            *(*score_scales(scale, softcap), lse_factor),
            D=D, BLOCK_Q=t.block_q, STAGES=t.stages,
            CONSUMER_REGISTERS=registers.consumer, PRODUCER_REGISTERS=registers.producer,
            CAPPED=softcap is not None, num_warps=4, maxnreg=registers.launch, enable_fp_fusion=True,
        )  # fmt: skip


def programs_a_group(group: int, longest: float, pairs: int, processors: int) -> int:
    """Among how many programs the query heads of a KV tile are divided.

    A program has HEADS of them at most, and fewer where tiles would end unevenly. longest: what a head's longest
    tile is of all its tiles; pairs: batch rows x KV heads. Dividing costs each program the copies of
    k, v, dk and dv: some 3 steps.
    """
    split = next(n for n in range(1, group + 1) if group % n == 0 and group // n <= HEADS)
    while group % (2 * split) == 0 and longest / split > 0.9 * pairs / processors:
        split *= 2
    return split


def heads_in_l2(q: Tensor, k: Tensor) -> int:
    """How many (batch row, KV head) pairs are worked on at a time, so that their q, dout and fp32 dq stay in L2."""
    _, Sq, Hq, D = q.shape
    return max(1, L2_BYTES // (Hq // k.shape[2] * Sq * D * (2 * q.element_size() + 4)))
