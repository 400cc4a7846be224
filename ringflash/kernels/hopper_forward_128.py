"""Warps of `hopper_forward` at head_dim 64 and 128, in Gluon: carry and out move through shared memory.

A query tile starts from an empty softmax state. The carried Partial is a state with z = 1, which the copy engine loads
while the tile is computed. At the tile's end, the two states are merged at M = max(m, m_carry):

    z' = 2^(m - M) z + 2^(m_carry - M)    acc' = 2^(m - M) acc + 2^(m_carry - M) carry

The copy engine then stores out from the same shared memory, under the first product of the next tile.
"""

# Annotations stay objects in this file (no `from __future__ import annotations`): Triton reads those of aggregates.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from ringflash.kernels.gluon_names import aggregate, copy_out, reinterpret
from ringflash.kernels.hopper_forward_parts import (
    FINAL,
    K_EMPTY,
    LOG2_E_,
    OUT,
    STAGES,
    TURN,
    V_EMPTY,
    begin_output,
    begin_scores,
    divided,
    first_tile,
    later_tiles,
    score_operands,
)
from ringflash.kernels.hopper_parts import (
    NEG_INF,
    ROWS,
    Pipe,
    arrive,
    make_pipe,
    next_tile,
    product_layout,
    receive_job,
)


@aggregate
class Shared:
    """All shared memory."""

    q: Pipe
    k: Pipe
    v: Pipe
    carry: Pipe  # out is also stored through it
    jobs: gl.shared_memory_descriptor  # a job per consumer, ready when its queries are


@gluon.jit
def make_shared(dtype: gl.constexpr, carry_dtype: gl.constexpr, call):
    """A program's shared memory, with initialised barriers."""
    q = make_pipe(dtype, call.CONSUMERS, ROWS, call.D, WRITERS=2)
    jobs = gl.allocate_shared_memory(gl.int32, [call.CONSUMERS, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k = make_pipe(dtype, STAGES, call.BLOCK_K, call.D, call.CONSUMERS, K_EMPTY)
    v = make_pipe(dtype, STAGES, call.BLOCK_K, call.D, call.CONSUMERS, V_EMPTY)
    carry = make_pipe(carry_dtype, call.CONSUMERS, ROWS, call.D, READERS=1 if call.CARRY else 0)
    return Shared(q, k, v, carry, jobs)


# -- the producer: one warp


@gluon.jit
def hand_over(fields, shared, number, call):
    """Pass a job to a consumer, together with the queries of this number."""
    slot = number % call.CONSUMERS
    shared.jobs.index(slot).store(fields)
    mbarrier.arrive(shared.q.full.index(slot), count=1)


@gluon.jit
def produce(call, shared, tensors):
    """Start all copies of all query tiles, as far ahead as there are empty slots."""
    q, k, v, carry = tensors[0], tensors[1], tensors[2], tensors[3]
    q_number = 0 * call.queries  # a tensor, as loop variables must be
    loaded = 0 * call.queries
    job = call.job(gl.program_id(0))
    while job.tiles > 0:
        # In the order in which they are needed: the first consumer's queries, keys, other queries, values.
        shared.q.load(q_number, q, job.batch, job.head, job.first_row)
        hand_over(job.fields(), shared, q_number, call)
        shared.k.load(loaded, k, job.batch, job.head_kv, call.key(job, 0))
        for who in gl.static_range(1, call.CONSUMERS):
            shared.q.load(q_number + who, q, job.batch, job.head, job.first_row + who * ROWS)
            hand_over(job.fields(), shared, q_number + who, call)
        shared.v.load(loaded, v, job.batch, job.head_kv, call.key(job, 0))
        following = next_tile(call.counter, call.total())  # not at the end, where the next queries would wait for it
        for step in range(1, job.tiles):
            key = call.key(job, step)
            shared.k.load(loaded + step, k, job.batch, job.head_kv, key)
            shared.v.load(loaded + step, v, job.batch, job.head_kv, key)
        if call.CARRY:
            # A consumer releases its slot when it starts the tile, one use ahead of the pipe's count.
            for who in gl.static_range(call.CONSUMERS):
                shared.carry.wait_empty(q_number + who + call.CONSUMERS)
                shared.carry.copy(q_number + who, carry, job.batch, job.head, job.first_row + who * ROWS)
        loaded += job.tiles
        q_number += call.CONSUMERS
        job = call.job(following)
    for who in gl.static_range(call.CONSUMERS):
        number = q_number + who
        shared.q.wait_empty(number)
        mbarrier.arrive(shared.q.full.index(number % call.CONSUMERS), count=1)
        hand_over(job.fields(), shared, number, call)


# -- the consumers: a warpgroup each


@gluon.jit
def consume(call, shared, tensors, WHO: gl.constexpr):
    """A consumer: the 64 rows from WHO x 64 of every query tile of this program."""
    S: gl.constexpr = product_layout(call.BLOCK_K)
    A: gl.constexpr = product_layout(call.D)
    if WHO == call.CONSUMERS - 1:
        arrive(TURN, 256)
    q_number = 0 * call.queries + WHO
    number = 0 * call.queries
    shared.q.wait_full(q_number)  # the copy engine and the producer
    job = receive_job(shared.jobs.index(WHO))
    while job.tiles > 0:
        start = call.start + job.batch.to(gl.int64) * call.interval_stride_b
        end = call.end + job.batch.to(gl.int64) * call.interval_stride_b
        rows = job.first_row + WHO * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        row_start = gl.load(start + rows, rows < call.queries, 0)
        row_end = gl.load(end + rows, rows < call.queries, 0)
        m = gl.full([ROWS], NEG_INF, gl.float32, gl.SliceLayout(1, S))
        z = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
        acc = gl.zeros([ROWS, call.D], gl.float32, A)

        # 1. The first tile: scores only. The result of the previous query tile is stored under them.
        q_tile = shared.q.tile(q_number)
        shared.k.wait_full(number)  # the copy engine
        q = score_operands(q_tile, call)
        scores = begin_scores(q, shared.k, number, call, WHO)
        tma.store_wait(0)  # the copy engine, which reads that result
        if call.CARRY:
            shared.carry.release(q_number)
        p, m, z, alpha = first_tile(scores, m, z, shared.k, shared.v, number, job, row_start, row_end, call)

        # 2 and 3. The other tiles.
        acc, p, m, z, alpha = later_tiles(
            acc, p, m, z, alpha, q, shared.k, shared.v, number, job, row_start, row_end, call, WHO
        )

        # 4. The last tile's values. Under them, the carried lse arrives.
        number += job.tiles
        job = receive_job(shared.jobs.index(WHO))  # read again, so that the loops need not keep it in registers
        shared.q.release(q_number)
        output = begin_output(acc, p, alpha, shared.v, number - 1, call)
        valid = rows < call.queries
        lse = call.lse + job.batch.to(gl.int64) * call.lse_stride_b + job.head.to(gl.int64) * call.lse_stride_h
        m_carry = m
        if call.CARRY:
            m_carry = gl.load(lse + rows, valid, NEG_INF) * LOG2_E_
        acc = warpgroup_mma_wait(0, deps=(output,))  # the tensor cores
        shared.v.release(number - 1)
        first_row = job.first_row + WHO * ROWS
        if call.CARRY:
            acc, m, z = merge(acc, m, z, m_carry, shared.carry, q_number)
        acc, total = divided(acc, m, z)
        gl.store(lse + rows, total, valid)
        write(acc, job, first_row, shared.carry, q_number, tensors, call)

        q_number += call.CONSUMERS
        shared.q.wait_full(q_number)  # the copy engine and the producer
        job = receive_job(shared.jobs.index(WHO))
    tma.store_wait(0)


@gluon.jit
def merge(acc, m, z, m_carry, carry_pipe, number):
    """The softmax state of rows, merged with the carried one."""
    A: gl.constexpr = acc.type.layout
    m_new = gl.maximum(m, m_carry)
    shift = gl.where(m_new == NEG_INF, 0.0, m_new)
    alpha = gl.exp2(m - shift)
    alpha_carry = gl.exp2(m_carry - shift)
    z = z * alpha + alpha_carry
    carry_pipe.wait_full(number)  # the copy engine
    acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, A)), 1)
    carried = carry_pipe.tile(number).load(A)
    acc += carried * gl.expand_dims(gl.convert_layout(alpha_carry, gl.SliceLayout(1, A)), 1)
    return acc, m_new, z


@gluon.jit
def write(acc, job, first_row, carry_pipe, number, tensors, call):
    """Start storing the result of rows from `first_row` on, through the carry's shared memory."""
    if call.FINISHES:
        if job.into == OUT:
            store(acc, tensors[4], [job.batch, job.head, first_row, 0], carry_pipe.tile(number))
        elif job.into == FINAL:
            store(acc, tensors[5], [job.batch, job.head, first_row, 0], carry_pipe.tile(number))
    else:
        store(acc, tensors[4], [job.batch, job.head, first_row, 0], carry_pipe.tile(number))


@gluon.jit
def store(acc, out, place, staged):
    """Start storing rows of out. The copy engine clips rows past the end."""
    if staged.dtype != out.dtype:
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([acc.shape[0], acc.shape[1]], out.dtype)
        staged = reinterpret(staged, out.dtype, acc.shape, layout)
    staged.store(acc.to(out.dtype))
    fence_async_shared()  # makes the threads' writes visible to the copy engine
    copy_out(out, place, staged)
