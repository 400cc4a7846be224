"""Warps of `hopper_backward` at head_dim 256, in Gluon: the two consumers divide the gradients.

A program holds 64 keys of one KV head. Their dk and dv are [64, 256] in fp32, and each takes 128 registers per thread
of a warpgroup. The two consumers therefore divide the products by gradient, not by keys as in `hopper_backward_128`:

    consumer 0    s = k q^T        p = 2^(c s)           dv += p^T dout    columns   0..127 of dq
    consumer 1    dp = v dout^T    ds = p (dp - delta)   dk += ds^T q      columns 128..255 of dq

Consumer 0 passes p to consumer 1 through shared memory, in 16 bits; both read ds. dq = ds k is one step late here too.
A consumer computes it 64 columns at a time (dqa, dqb): with both in registers, ptxas would serialise every product. It
passes them to its reducer, a warp that adds them to memory.

The pipeline of step 2. ds1 is the previous step's ds:

    tensor cores, 0    s2 = k q2^T . dqa1 = ds1 k |              dv += p2 dout2 . dqb1 = ds1 k |
    consumer 0         |             p2 = 2^(c s2)              | dqa1 to reducer              | dqb1 to reducer
    tensor cores, 1    dp2 = v dout2^T . dqa1 = ds1 k |          dk += ds2 q2 . dqb1 = ds1 k   |
    consumer 1         |                 ds2 = p2 (dp2 - delta) | dqa1 to reducer              | dqb1 to reducer
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

# These names differ from those of `hopper_backward_128`: Triton's cache key orders globals by name and, for equal
# names, by address, which differs from process to process.
P_FULL = gl.constexpr(FIRST_BARRIER)  # p is in shared memory
DS_FULL = gl.constexpr(FIRST_BARRIER + 1)
Q_EMPTY = gl.constexpr(FIRST_BARRIER + 2)  # 2, one per stage
DOUT_EMPTY = gl.constexpr(FIRST_BARRIER + 4)
INPUTS_READ = gl.constexpr(FIRST_BARRIER + 5)  # k, v and q, by both consumers
STAGED = gl.constexpr(FIRST_BARRIER - 2)  # 2: dq of each consumer. Triton uses the numbers from 0 to 4
PIECE = gl.constexpr(64)  # columns of dq at a time


@aggregate
class Shared:
    """All shared memory. Tiles 0 and 1 of kv are k and v, filled once.

    Query tile number n and its lse are in slot n % DEPTH; dout and delta have one slot.
    """

    kv: Pipe
    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor  # lse_factor lse, -inf where a row sees nothing
    delta: gl.shared_memory_descriptor  # -delta
    q_full: gl.shared_memory_descriptor
    dout_full: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor  # one tile, [keys, queries], times the softcap's derivative
    ds: gl.shared_memory_descriptor  # one tile each for even and odd steps, [keys, queries]
    dq: gl.shared_memory_descriptor  # one piece per consumer
    dq_empty: gl.shared_memory_descriptor
    DEPTH: gl.constexpr

    @gluon.jit
    def wait_q(self, number, pred=True):
        """Wait for a query tile and its lse."""
        mbarrier.wait(self.q_full.index(number % self.DEPTH), number // self.DEPTH & 1, pred=pred)

    @gluon.jit
    def wait_dout(self, number, pred=True):
        """Wait for a tile of dout and its delta."""
        mbarrier.wait(self.dout_full.index(0), number & 1, pred=pred)


@gluon.jit
def make_empty():
    """A barrier per consumer, at which its reducer signals that it has sent dq."""
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for who in gl.static_range(2):
        mbarrier.init(empty.index(who), count=1)
    return empty


@gluon.jit
def make_shared(dtype: gl.constexpr, D: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr):
    """A program's shared memory, with initialised barriers."""
    q_full = make_full(STAGES)
    dout_full = make_full(1)
    return Shared(
        make_pipe(dtype, 2, ROWS, D),
        make_tiles(dtype, STAGES, BLOCK_Q, D),
        make_tiles(dtype, 1, BLOCK_Q, D),
        make_rows(STAGES, BLOCK_Q),
        make_rows(1, BLOCK_Q),
        q_full,
        dout_full,
        make_tiles(dtype, 1, ROWS, BLOCK_Q),
        make_tiles(dtype, 2, ROWS, BLOCK_Q),
        make_tiles(gl.float32, 2, BLOCK_Q, PIECE),
        make_empty(),
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
                sync(Q_EMPTY + slot, 288, 1)  # both consumers
            full = shared.q_full.index(slot)
            mbarrier.expect(full, q.block_type.nbytes)
            copy_in(q, [job.batch, head, row, 0], full, shared.q.index(slot))
            shared.lse.index(slot).store(gl.where(row_lse == NEG_INF, NEG_INF, row_lse * call.lse_factor))
            mbarrier.arrive(full, count=1)
            if number >= 1:
                sync(DOUT_EMPTY, 288, 1)  # both consumers
            full = shared.dout_full.index(0)
            mbarrier.expect(full, dout.block_type.nbytes)
            copy_in(dout, [job.batch, head, row, 0], full, shared.dout.index(0))
            shared.delta.index(0).store(-row_delta)
            mbarrier.arrive(full, count=1)
            number += 1


# -- the reducers: one warp per consumer


@gluon.jit
def reduce(call, shared, descriptors, WHO: gl.constexpr):
    """Add a consumer's dq to memory, so that its warps do not wait for each other before and after each copy.

    dq comes one step late: what the first step stages belongs to no queries.
    """
    dq = descriptors[4]
    job = call.job()
    staged, empty = shared.dq.index(WHO), shared.dq_empty.index(WHO)
    if job.tiles > 0:
        for _ in gl.static_range(2):
            sync(STAGED + WHO, 160, 1)
            mbarrier.arrive(empty, count=1)
    for member in range(job.heads):
        for step in range(job.tiles):
            head, row = job.head + member, call.row(job, step)
            for piece in gl.static_range(2):
                sync(STAGED + WHO, 160, 1)  # the consumer
                add_out(dq, [job.batch, head, row, WHO * (call.D // 2) + piece * PIECE], staged)
                tma.store_wait(0)  # the copy engine, reading
                mbarrier.arrive(empty, count=1)


# -- the consumers: a warpgroup each


@gluon.jit
def begin_dq(shared, number, call, column):
    """Start 64 columns of dq of the previous step, whose ds is in slot `number`. Returns a product in flight."""
    Q: gl.constexpr = product_layout(PIECE)
    zeros = gl.zeros([call.BLOCK_Q, PIECE], gl.float32, Q)
    k_piece = shared.kv.tiles.index(opaque_zero(number)).slice(column, PIECE, 1)
    ds = shared.ds.index(number % 2).permute((1, 0))
    return warpgroup_mma(ds, k_piece, zeros, use_acc=False, is_async=True)


@gluon.jit
def pass_dq(piece, shared, number, call, WHO: gl.constexpr):
    """Pass piece `number` of dq to this consumer's reducer.

    The factor comes here, not in `round_dq`: without it, ptxas stores from a product's accumulators and serialises all
    products.
    """
    mbarrier.wait(shared.dq_empty.index(WHO), (number & 1) ^ 1)  # the reducer
    stage_dq(piece * call.scale, shared.dq.index(WHO))
    fence_async_shared()  # makes the threads' writes visible to the copy engine
    arrive(STAGED + WHO, 160)


@gluon.jit
def step(
    acc, shared, number, more, row, key_start, key_end, call,
    WHO: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Add query tile `number` to this consumer's gradient, acc, and compute its half of dq of the previous tile.

    more: whether another tile follows.
    """
    S: gl.constexpr = product_layout(call.BLOCK_Q)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    COLUMN: gl.constexpr = WHO * (call.D // 2)
    slot = number % shared.DEPTH
    q_tile = shared.q.index(slot)
    dout_tile = shared.dout.index(0)
    zeros = gl.zeros([ROWS, call.BLOCK_Q], gl.float32, S)
    if WHO == 0:
        lse = gl.expand_dims(shared.lse.index(slot).load(gl.SliceLayout(0, S)), 0)
        keys = shared.kv.tiles.index(opaque_zero(number))
        scores = warpgroup_mma(keys, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        sync(DS_FULL, 256, 4)  # ds of the previous step
        dq_piece = begin_dq(shared, number, call, COLUMN)
        s = warpgroup_mma_wait(1, deps=(scores,))  # the tensor cores, for the older of two products
        arrive(Q_EMPTY + slot, 288)
        p, slope = weights(s, lse, call, row, key_start, key_end, EDGE)
        weighted = p * slope
        left = gl.convert_layout(p.to(q_tile.dtype), LEFT)
        shared.p.index(0).store(weighted.to(q_tile.dtype))
        arrive(P_FULL, 256)
        dq_piece = warpgroup_mma_wait(0, deps=(dq_piece,))
        shared.wait_dout(number)  # the copy engine and the producer
        right = dout_tile
    else:
        values = shared.kv.tiles.index(1 + opaque_zero(number))
        scores = warpgroup_mma(values, dout_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dq_piece = begin_dq(shared, number, call, COLUMN)
        delta = gl.expand_dims(shared.delta.index(0).load(gl.SliceLayout(0, S)), 0)
        dp = warpgroup_mma_wait(1, deps=(scores,))  # the tensor cores, for the older of two products
        dp = dp + delta
        arrive(DOUT_EMPTY, 288)
        sync(P_FULL, 256, 4)  # the other consumer
        ds = (shared.p.index(0).load(S).to(gl.float32) * dp).to(q_tile.dtype)
        shared.ds.index((number + 1) % 2).store(ds)
        fence_async_shared()  # makes the threads' writes visible to the tensor cores
        arrive(DS_FULL, 256)
        left = gl.convert_layout(ds, LEFT)
        dq_piece = warpgroup_mma_wait(0, deps=(dq_piece,))
        shared.wait_q(number)
        right = q_tile
    acc_next = warpgroup_mma(left, right, acc, is_async=True)
    pass_dq(dq_piece, shared, 2 * number, call, WHO)
    second = begin_dq(shared, number, call, COLUMN + PIECE)
    acc = warpgroup_mma_wait(1, deps=(acc_next,))  # the tensor cores
    if WHO == 0:
        shared.wait_q(number + 1, more)
    else:
        shared.wait_dout(number + 1, more)
    if WHO == 0:
        arrive(DOUT_EMPTY, 288)
    else:
        arrive(Q_EMPTY + slot, 288)
    second = warpgroup_mma_wait(0, deps=(second,))
    pass_dq(second, shared, 2 * number + 1, call, WHO)
    return acc


@gluon.jit
def finish(acc, job, shared, descriptors, call, WHO: gl.constexpr):
    """Write dv or dk to memory. The shared memory of k and v stages dv, that of q stages dk."""
    dk, dv = descriptors[5], descriptors[6]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, call.D], dk.dtype)
    if WHO == 0:
        staged = reinterpret(shared.kv.tiles, dv.dtype, [ROWS, call.D], layout)
        store_gradient(acc, staged, dv, [job.batch, job.head_kv, job.first_row, 0])
    else:
        staged = reinterpret(shared.q, dk.dtype, [ROWS, call.D], layout)
        store_gradient(acc * call.scale, staged, dk, [job.batch, job.head_kv, job.first_row, 0])
    tma.store_wait(0)  # the copy engine, reading


@gluon.jit
def consume(call, shared, descriptors, WHO: gl.constexpr):
    """A consumer: dv (WHO 0) or dk (WHO 1) of this program's keys, and half of dq's columns."""
    A: gl.constexpr = product_layout(call.D)
    S: gl.constexpr = product_layout(call.BLOCK_Q)
    COLUMN: gl.constexpr = WHO * (call.D // 2)
    job = call.job()
    if job.tiles > 0:
        key_start, key_end = call.seen_by(job, job.first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S)))
        acc = gl.zeros([ROWS, call.D], gl.float32, A)
        full = job.tiles - job.edges
        last = job.tiles * job.heads - 1
        number = 0
        if WHO == 1:
            # Zeros stand for ds of the step before the first. The reducers drop their dq.
            shared.ds.index(0).store(gl.zeros([ROWS, call.BLOCK_Q], descriptors[0].dtype, S))
            fence_async_shared()
            arrive(DS_FULL, 256)
        shared.kv.wait_full(0)  # the copy engine; dq reads k
        if call.CENTERED:  # consumer 0 centers for both; the barrier is not used again before the end
            if WHO == 0:
                center_keys(shared.kv.tile(0), job, call)
                fence_async_shared()  # makes the threads' writes visible to the tensor cores
                arrive(INPUTS_READ, 256)
            else:
                sync(INPUTS_READ, 256, 4)
        shared.kv.wait_full(1)
        if WHO == 0:
            shared.wait_q(0)
        else:
            shared.wait_dout(0)
        for _ in range(job.heads):
            # 1. Query tiles that see every key: no mask.
            for i in range(full):
                acc = step(
                    acc, shared, number + i, number + i < last, call.row(job, i),
                    0, 0, call, WHO, EDGE=False,
                )  # fmt: skip

            # 2. Query tiles that see only some of the keys.
            for i in range(full, job.tiles):
                acc = step(
                    acc, shared, number + i, number + i < last, call.row(job, i),
                    key_start, key_end, call, WHO, EDGE=True,
                )  # fmt: skip
            number += job.tiles

        # 3. dq of the last query tile.
        if WHO == 0:
            sync(DS_FULL, 256, 4)
        for piece in gl.static_range(2):
            dq_piece = warpgroup_mma_wait(0, deps=(begin_dq(shared, number, call, COLUMN + piece * PIECE),))
            pass_dq(dq_piece, shared, 2 * number + piece, call, WHO)

        # 4. dv and dk, once neither consumer reads k, v and q.
        sync(INPUTS_READ, 256, 4)  # the other consumer
        finish(acc, job, shared, descriptors, call, WHO)
    elif descriptors[5].dtype != gl.float32:  # no query sees these keys
        finish(gl.zeros([ROWS, call.D], gl.float32, A), job, shared, descriptors, call, WHO)
