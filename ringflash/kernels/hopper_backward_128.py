"""Warps of `hopper_backward` at head_dim 128, in Gluon: the two consumers divide the keys.

A program holds 128 keys of one KV head. A consumer owns 64 of them and computes their dk and dv. dq is a sum over all
keys: each consumer publishes its ds in shared memory and computes half of dq's columns from both. It does so one step
late, in the middle of the next step, when the other's ds has long been ready. So the consumers may be up to half a step
apart, and one's products run under the other's exponentials.

The pipeline of a consumer's step 2. ds1 is both consumers' ds of the previous step:

    copy engine      q3, dout3                                                                 dq1 +=
    tensor cores     s2 = k q2^T . dp2 = v dout2^T | dv += p2 dout2 . dq1 = ds1 k       . dk += ds2 q2
    consumer                       p2 = 2^(c s2)   | ds2 = p2 (dp2 - delta)             | dq1, ds2 to shared memory
"""

# Annotations stay objects in this file (no `from __future__ import annotations`): Triton reads those of aggregates.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringflash.kernels.gluon_names import add_out, aggregate, copy_in, reinterpret
from ringflash.kernels.hopper_backward_parts import (
    center_keys,
    make_full,
    make_rows,
    stage_dq,
    store_gradient,
    weights,
)
from ringflash.kernels.hopper_parts import (
    FIRST_BARRIER,
    NEG_INF,
    ROWS,
    Pipe,
    arrive,
    make_pipe,
    make_tiles,
    opaque_zero,
    product_layout,
    sync,
)

PUBLISHED = gl.constexpr(FIRST_BARRIER)  # 4: ds of each consumer, in even and in odd steps
EMPTY = gl.constexpr(FIRST_BARRIER + 4)  # one per stage, at most 3
DONE = gl.constexpr(FIRST_BARRIER + 7)


@aggregate
class Shared:
    """All shared memory. Tiles 0 and 1 of kv are k and v of both consumers, filled once.

    A stage is a query tile with its dout, lse and delta; number n is in slot n % DEPTH. It is full once the copy
    engine's bytes have arrived and the producer has written lse and delta, and empty once both consumers release it.
    """

    kv: Pipe
    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor  # lse_factor lse, -inf where a row sees nothing
    delta: gl.shared_memory_descriptor  # -delta
    full: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor  # two steps of both consumers' keys, [keys, queries]
    dq: gl.shared_memory_descriptor  # one tile per consumer: half of the columns
    DEPTH: gl.constexpr

    @gluon.jit
    def wait_full(self, number, pred=True):
        """Wait for a stage to be filled."""
        mbarrier.wait(self.full.index(number % self.DEPTH), number // self.DEPTH & 1, pred=pred)


@gluon.jit
def make_shared(dtype: gl.constexpr, D: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr):
    """A program's shared memory, with initialised barriers."""
    full = make_full(STAGES)
    return Shared(
        make_pipe(dtype, 2, 2 * ROWS, D),
        make_tiles(dtype, STAGES, BLOCK_Q, D),
        make_tiles(dtype, STAGES, BLOCK_Q, D),
        make_rows(STAGES, BLOCK_Q),
        make_rows(STAGES, BLOCK_Q),
        full,
        make_tiles(dtype, 2, 2 * ROWS, BLOCK_Q),
        make_tiles(gl.float32, 2, BLOCK_Q, D // 2),
        STAGES,
    )


# -- the producer: one warp


@gluon.jit
def produce(call, shared, descriptors):
    """Start all copies, as far ahead as there are empty slots, and write lse and delta to shared memory."""
    q, k, v, dout = descriptors[0], descriptors[1], descriptors[2], descriptors[3]
    job = call.job()
    lse = call.lse + job.batch.to(gl.int64) * call.lse_stride_b
    delta = call.delta + job.batch.to(gl.int64) * call.delta_stride_b
    index = gl.arange(0, call.BLOCK_Q, layout=gl.BlockedLayout([call.BLOCK_Q // 32], [32], [1], [0]))
    if job.tiles > 0:
        shared.kv.load(0, k, job.batch, job.head_kv, job.first_row)
        shared.kv.load(1, v, job.batch, job.head_kv, job.first_row)
    number = 0
    for member in range(job.heads):
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
    """Start this consumer's half of the previous step's dq, over both consumers' keys. Returns a product in flight."""
    HALF: gl.constexpr = call.D // 2
    Q: gl.constexpr = product_layout(HALF)
    slot = number % 2
    zeros = gl.zeros([call.BLOCK_Q, HALF], gl.float32, Q)
    sync(PUBLISHED + 2 * (1 - WHO) + slot, 256, 4)  # the other consumer
    keys = shared.kv.tiles.index(opaque_zero(number)).slice(WHO * HALF, HALF, 1)
    return warpgroup_mma(shared.ds.index(slot).permute((1, 0)), keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def publish(ds, shared, number, WHO: gl.constexpr):
    """Write this consumer's ds to shared memory, for dq of both consumers, who read it after a fence and `announce`.

    The slot is empty: its last reader was the other consumer's dq of two steps ago. That was done before the other
    published the ds for which this consumer has waited since.
    """
    shared.ds.index(number % 2).slice(WHO * ROWS, ROWS, 0).store(ds)


@gluon.jit
def announce(number, WHO: gl.constexpr):
    """Signal to the other consumer that ds is in shared memory. Called after the fence."""
    arrive(PUBLISHED + 2 * WHO + number % 2, 256)


@gluon.jit
def stage(dq_half, shared, call, WHO: gl.constexpr):
    """Write this consumer's half of dq to shared memory, without its scale (`round_dq`)."""
    stage_dq(dq_half, shared.dq.index(WHO))


@gluon.jit
def step(
    dk, dv, dq_head, dq_row, shared, number, more, batch, head, row, key_start, key_end, dq, call,
    WHO: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Scores, dk and dv of query tile `number` with this consumer's keys, and dq of the previous tile.

    dv starts before the wait for dp. Because it needs p, ptxas cannot move the exponentials below that wait, where they
    would overlap with nothing. more: whether another tile follows.
    """
    S: gl.constexpr = product_layout(call.BLOCK_Q)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dk.type.layout, k_width=2)
    slot = number % shared.DEPTH
    q_tile = shared.q.index(slot)
    dout_tile = shared.dout.index(slot)
    zeros = gl.zeros([ROWS, call.BLOCK_Q], gl.float32, S)

    keys = shared.kv.tiles.index(opaque_zero(number)).slice(WHO * ROWS, ROWS, 0)
    values = shared.kv.tiles.index(1 + opaque_zero(number)).slice(WHO * ROWS, ROWS, 0)
    lse = gl.expand_dims(shared.lse.index(slot).load(gl.SliceLayout(0, S)), 0)
    scores = warpgroup_mma(keys, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dscores = warpgroup_mma(values, dout_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(scores,))  # the tensor cores, for the older of two products
    p, slope = weights(s, lse, call, row, key_start, key_end, EDGE)
    dv_next = warpgroup_mma(gl.convert_layout(p.to(q_tile.dtype), LEFT), dout_tile, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dscores,))  # the tensor cores, for all but dv
    delta = gl.expand_dims(shared.delta.index(slot).load(gl.SliceLayout(0, S)), 0)
    ds = (p * (dp + delta) * slope).to(q_tile.dtype)
    dq_next = begin_dq(shared, number, call, WHO)
    dk_next = warpgroup_mma(gl.convert_layout(ds, LEFT), q_tile, dk, is_async=True)
    tma.store_wait(0)  # the copy engine, which reads dq of the previous step from the same shared memory
    dq_half = warpgroup_mma_wait(1, deps=(dq_next,))  # the tensor cores, for all but dk
    publish(ds, shared, number + 1, WHO)
    stage(dq_half, shared, call, WHO)
    fence_async_shared()  # makes the threads' writes visible to tensor cores and copy engine
    announce(number + 1, WHO)
    add_out(dq, [batch, dq_head, dq_row, WHO * (call.D // 2)], shared.dq.index(WHO))
    shared.wait_full(number + 1, more)  # the copy engine and the producer
    dk, dv = warpgroup_mma_wait(0, deps=(dk_next, dv_next))  # the tensor cores
    arrive(EMPTY + slot, 288)
    return dk, dv, head, row


@gluon.jit
def walk_queries(
    step: gl.constexpr, dk, dv, shared, job, key_start, key_end, dq, call, WHO: gl.constexpr
):  # fmt: skip
    """One step per query tile and head. Returns dk, dv, the number of steps, and the place of the last tile's dq.

    For the first step, the previous tile's dq is zero, and its place is past the end.
    """
    full = job.tiles - job.edges
    last = job.tiles * job.heads - 1
    number = 0
    dq_head = job.head
    dq_row = call.queries
    for member in range(job.heads):
        head = job.head + member

        # 1. Query tiles that see every key: no mask.
        for i in range(full):
            dk, dv, dq_head, dq_row = step(
                dk, dv, dq_head, dq_row, shared, number + i, number + i < last, job.batch, head,
                call.row(job, i), 0, 0, dq, call, WHO, EDGE=False,
            )  # fmt: skip

        # 2. Query tiles that see only some of the keys.
        for i in range(full, job.tiles):
            dk, dv, dq_head, dq_row = step(
                dk, dv, dq_head, dq_row, shared, number + i, number + i < last, job.batch, head,
                call.row(job, i), key_start, key_end, dq, call, WHO, EDGE=True,
            )  # fmt: skip
        number += job.tiles
    return dk, dv, number, dq_head, dq_row


@gluon.jit
def store_gradients(dk_acc, dv_acc, row, job, shared, descriptors, call, WHO: gl.constexpr):
    """Add or write this consumer's dk and dv, staged in the shared memory of k and v.

    In fp32 there is room for one tile per consumer, in 16 bits for both.
    """
    dk, dv = descriptors[5], descriptors[6]
    ROOM: gl.constexpr = 2 if dk.dtype == gl.float32 else 4
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, call.D], dk.dtype)
    staged = reinterpret(shared.kv.tiles, dk.dtype, [ROOM, ROWS, call.D], layout)
    store_gradient(dk_acc * call.scale, staged.index(WHO), dk, [job.batch, job.head_kv, row, 0])
    if ROOM == 2:
        tma.store_wait(0)  # the copy engine, which reads the same shared memory
    store_gradient(dv_acc, staged.index(ROOM - 2 + WHO), dv, [job.batch, job.head_kv, row, 0])
    tma.store_wait(0)


@gluon.jit
def finish(stage: gl.constexpr, dq_next, dk_acc, dv_acc, place, row, job, shared, descriptors, call, WHO: gl.constexpr):
    """Add half of dq of the last query tile, whose product is in flight; then add or write dk and dv."""
    dq = descriptors[4]
    tma.store_wait(0)
    dq_half = warpgroup_mma_wait(0, deps=(dq_next,))
    stage(dq_half, shared, call, WHO)
    fence_async_shared()
    add_out(dq, place, shared.dq.index(WHO))
    sync(DONE, 256, 4)  # the other consumer; neither reads k and v after this
    store_gradients(dk_acc, dv_acc, row, job, shared, descriptors, call, WHO)


@gluon.jit
def consume(call, shared, descriptors, WHO: gl.constexpr):
    """A consumer: the 64 keys from WHO x 64 of this program's KV tile."""
    dq = descriptors[4]
    A: gl.constexpr = product_layout(call.D)
    S: gl.constexpr = product_layout(call.BLOCK_Q)
    job = call.job()
    if job.tiles > 0:
        row = job.first_row + WHO * ROWS
        key_start, key_end = call.seen_by(job, row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S)))
        dk_acc = gl.zeros([ROWS, call.D], gl.float32, A)
        dv_acc = gl.zeros([ROWS, call.D], gl.float32, A)
        shared.kv.wait_full(0)  # the copy engine
        if call.CENTERED:
            center_keys(shared.kv.tile(0).slice(WHO * ROWS, ROWS, 0), job, call)
        # Zeros stand for the step before the first; their dq is past the end, where the copy engine drops it. The fence
        # and the announcement also cover centered keys, which the other consumer reads for its dq.
        publish(gl.zeros([ROWS, call.BLOCK_Q], descriptors[0].dtype, S), shared, 0, WHO)
        fence_async_shared()
        announce(0, WHO)
        shared.kv.wait_full(1)  # the copy engine
        shared.wait_full(0)
        dk_acc, dv_acc, number, dq_head, dq_row = walk_queries(
            step, dk_acc, dv_acc, shared, job, key_start, key_end, dq, call, WHO
        )
        # dq of the last query tile, then dk and dv.
        dq_next = begin_dq(shared, number, call, WHO)
        place = [job.batch, dq_head, dq_row, WHO * (call.D // 2)]
        finish(stage, dq_next, dk_acc, dv_acc, place, row, job, shared, descriptors, call, WHO)
    elif descriptors[5].dtype != gl.float32:  # no query sees these keys
        unseen = gl.zeros([ROWS, call.D], gl.float32, A)
        store_gradients(unseen, unseen, job.first_row + WHO * ROWS, job, shared, descriptors, call, WHO)
