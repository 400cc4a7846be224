"""Warps of `hopper_backward` at head_dim 64, in Gluon: `hopper_backward_128` with keys and values in smaller tiles.

k and v are two tiles each, of 64 keys: a consumer reads its own, and both tiles of k for dq, in two products. lse is
loaded in the step that needs it: a step ahead lost 5 percent at 32k tokens. Keys are centered before the launch. Tiles
of 128 keys gained 1.5 percent in the one shape that was timed; with centered keys they have not run.
"""

# Annotations stay objects in this file (no `from __future__ import annotations`): Triton reads those of aggregates.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringflash.kernels.gluon_names import add_out
from ringflash.kernels.hopper_backward_128 import (
    EMPTY,
    PUBLISHED,
    Shared,
    add_gradients,
    announce,
    bring_queries,
)
from ringflash.kernels.hopper_backward_parts import make_full, make_rows, stage_dq, weights
from ringflash.kernels.hopper_parts import ROWS, arrive, make_pipe, make_tiles, product_layout, sync


@gluon.jit
def make_shared(dtype: gl.constexpr, D: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of a program, its barriers initialised: of k, v and ds a tile per consumer."""
    full = make_full(STAGES)
    return Shared(
        make_pipe(dtype, 4, ROWS, D),
        make_tiles(dtype, STAGES, BLOCK_Q, D),
        make_tiles(dtype, STAGES, BLOCK_Q, D),
        make_rows(STAGES, BLOCK_Q),
        make_rows(STAGES, BLOCK_Q),
        full,
        make_tiles(dtype, 4, ROWS, BLOCK_Q),
        make_tiles(gl.float32, 2, BLOCK_Q, D // 2),
        STAGES,
    )


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
    bring_queries(call, shared, job, lse, delta, index, q, dout)


# -- the consumers: a warpgroup each


@gluon.jit
def begin_dq(shared, number, call, WHO: gl.constexpr):
    """This consumer's half of dq's columns of the step before, over both consumers' keys: two products in flight."""
    HALF: gl.constexpr = call.D // 2
    Q: gl.constexpr = product_layout(HALF)
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
def step(
    dk, dv, dq_head, dq_row, shared, number, more, batch, head, row, key_start, key_end, dq, call,
    WHO: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Scores, dk and dv of query tile `number` with this consumer's keys, and dq of the one before it.

    dv begins before the wait for dp: a product that needs p is what keeps ptxas from moving the exponentials below that
    wait, where nothing would run under them. more: whether another tile follows.
    """
    S: gl.constexpr = product_layout(call.BLOCK_Q)
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
    p, slope = weights(s, lse, call, row, key_start, key_end, EDGE)
    dv_next = warpgroup_mma(gl.convert_layout(p.to(q_tile.dtype), LEFT), dout_tile, dv, is_async=True)
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
    dq = descriptors[4]
    A: gl.constexpr = product_layout(call.D)
    S: gl.constexpr = product_layout(call.BLOCK_Q)
    job = call.job()
    if job.tiles > 0:
        row = job.first_row + WHO * ROWS
        key_start, key_end = call.seen_by(job, row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S)))
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

        # 3. dq of the last query tile, then dk and dv.
        dq_next = begin_dq(shared, number, call, WHO)
        add_gradients(dq_next, dk_acc, dv_acc, dq_head, dq_row, row, job, shared, descriptors, call, WHO)
