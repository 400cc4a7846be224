"""Attention forward for Hopper (sm_90), in Gluon: the mathematics of `portable_forward`, scheduled by hand.

There is one program per SM, which takes query tiles from a counter. A query tile has 2 or 3 x 64 rows of one head. A
consumer, one warpgroup (4 warps, the unit that issues wgmma), owns 64 of them. For a row, with s = q k^T,
c = scale log2(e) and the softmax state (m, z, acc):

    m' >= c max_j s_j - 8    p_j = 2^(c s_j - m')    a = 2^(m - m')    z' = a z + sum_j p_j    acc' = a acc + p v

and at the end out = acc / z, lse = ln(2) (m + log2 z). A carried Partial is such a state too and is merged there. m'
only needs to be near the maximum, so m is kept until a weight would exceed 2^8. Then it becomes the maximum. So a is 1
in almost every step, and a warp whose rows all have a = 1 skips a acc, which is an eighth of its instructions at
head_dim 128. `hopper_softmax` has two ways to detect large weights: by the tile's maximum or, in full tiles at head_dim
64 and 256 (GUESS), by the weights themselves. See `portable_forward` for the softcap.

`start` and `end` never decrease. The bounds of a tile's first and last row therefore tell which KV tiles all of its
rows see (full) and which only some (edges):

    keys      lo ......... full_from ........................ hi
    tiles     | edge | edge |  full  |  full  |  full  | edge | edge |
    order         1      2       5        6        7       3     4

Edges come first: the first tile is computed before the loops and masked in any case, and the bounds of rows no longer
take registers when the full tiles run. The loop over full tiles is the same for every mask.

The producer is one warp that only starts copies. Consumers take turns in starting their products (named barriers). At
head_dim 128 there are two, A and B. Their registers hold p of one tile and the scores of the next, and the tensor cores
run one consumer's products under the other's exponentials:

    copy engine     k3 v2             k4 v3             k5 v4
    tensor cores    A: q k2, p1 v1  | B: q k2, p1 v1  | A: q k3, p2 v2  | B: q k3, p2 v2
    A               ............... | p2 = 2^(..)     | ............... | p3 = 2^(..)
    B               p1 = 2^(..)     | ............... | p2 = 2^(..)     | ...............

At head_dim 64, a step has half the products for the same number of exponentials. There are three consumers, and each
works in sequence: start p1 v1 and q k2, wait for both, compute p2 = 2^(..).

At head_dim 256, there are two such consumers, with 64 keys per step. Half of q's columns stay in registers, so that the
scores read a quarter less shared memory. Shared memory has no room for the carry and out, which therefore move directly
between registers and memory (DIRECT).
"""

# Annotations stay objects in this file (no `from __future__ import annotations`): Triton reads those of aggregates.
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringflash.kernels.checks import check_out, check_seen
from ringflash.kernels.gluon_names import aggregate
from ringflash.kernels.hopper_parts import (
    FIRST_BARRIER,
    L2_BYTES,
    NEG_INF,
    REGISTERS,
    ROWS,
    Job,
    arrive,
    check_addresses,
    check_inputs,
    check_rows,
    counter,
    make_pipe,
    next_tile,
    product_layout,
    receive_job,
    supports,
    sync,
    tile_run,
    tiles,
)
from ringflash.kernels.hopper_result import result, write
from ringflash.kernels.hopper_softmax import guess_step, packed, scale_rows, softmax_step, to_rows, to_threads, unpacked
from ringflash.kernels.portable_parts import (
    LOG2_E,
    interval_stride,
    outputs,
    result_without_keys,
    score_scales,
    seen_argument,
    sm_count,
)
from ringflash.mask import Intervals
from ringflash.partial import Partial

__all__ = ["forward", "supports"]

LOG2_E_ = gl.constexpr(LOG2_E)
HELD = gl.constexpr(128)  # columns of q in registers at head_dim 256: 32 registers per thread
STAGES = gl.constexpr(2)  # K tiles, and V tiles, in shared memory
# Where the result of a tile is written. NOWHERE: an earlier call completed it, and the carry does not have it.
OUT, FINAL, NOWHERE = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
# Named barriers. TURN has one per consumer, which it shares with the consumer before it.
TURN = gl.constexpr(FIRST_BARRIER)
K_EMPTY = gl.constexpr(FIRST_BARRIER + 3)
V_EMPTY = gl.constexpr(FIRST_BARRIER + 3 + STAGES.value)


@dataclass(frozen=True)
class Tuning:
    """Tile sizes of one launch."""

    consumers: int  # with 64 query rows each
    block_k: int  # keys per step

    def __post_init__(self) -> None:
        if self.consumers not in REGISTERS:
            raise ValueError(f"consumers must be 2 or 3, got {self.consumers}")
        if self.block_k not in (16, 32, 64, 128, 256):
            raise ValueError(f"block_k must be a power of two from 16 to 256, got {self.block_k}")


TUNINGS = {
    64: Tuning(consumers=3, block_k=128),
    # Scores and p 64 registers per thread, acc 64, p in flight 32. 224 of 227 KB with a carry; 64 keys: 15% slower.
    128: Tuning(consumers=2, block_k=128),
    # acc takes 128 registers per thread, scores 32, p 32. 192 KB: no room for out, which is stored from registers.
    256: Tuning(consumers=2, block_k=64),
}


@aggregate
class Call:
    """A call's pointers, scalars and constants."""

    lse: gl.tensor
    lse_stride_b: gl.tensor
    lse_stride_h: gl.tensor
    carry_stride_b: gl.tensor  # these nine if DIRECT
    carry_stride_s: gl.tensor
    carry_stride_h: gl.tensor
    out_stride_b: gl.tensor
    out_stride_s: gl.tensor
    out_stride_h: gl.tensor
    final_stride_b: gl.tensor
    final_stride_s: gl.tensor
    final_stride_h: gl.tensor
    seen: gl.tensor  # if FINISHES
    seen_stride_b: gl.tensor
    seen_later: gl.tensor  # stride from this call's counts to those of later calls
    start: gl.tensor
    end: gl.tensor
    interval_stride_b: gl.tensor
    counter: gl.tensor  # of `next_tile`
    order: gl.tensor
    order_stride_b: gl.tensor
    tiles: gl.tensor  # query tiles per head that programs process
    queries: gl.tensor
    heads_kv: gl.tensor
    group: gl.tensor  # query heads of a KV head
    pairs: gl.tensor  # batch rows x KV heads
    heads_in_l2: gl.tensor  # pairs processed at a time
    c: gl.tensor
    cap_scale: gl.tensor
    D: gl.constexpr
    BLOCK_K: gl.constexpr
    CONSUMERS: gl.constexpr
    CAPPED: gl.constexpr
    CARRY: gl.constexpr
    GUESS: gl.constexpr  # consumers work in sequence, with `guess_step` in full tiles and p in `packed` form
    DIRECT: gl.constexpr  # carry and out move directly between registers and memory
    FINISHES: gl.constexpr  # tiles that no later call sees are written to `final`, the others to out

    @gluon.jit
    def key(self, job, step):
        """The first key of a step's tile: the edges come first, then the full tiles."""
        edge = gl.where(step < job.full_from, step, step + job.tiles - job.edges)
        return job.lo + gl.where(step < job.edges, edge, job.full_from + step - job.edges) * self.BLOCK_K

    @gluon.jit
    def into(self, batch, first, last):
        """Where the result of rows first..last is written: to `final` by the last call that sees any of them."""
        into = 0 * first + OUT
        if self.FINISHES:
            seen = self.seen + batch.to(gl.int64) * self.seen_stride_b
            later = seen + self.seen_later
            into = gl.where(gl.load(later + last + 1) > gl.load(later + first), OUT, FINAL)
            if self.CARRY:  # otherwise this is the first call, which writes every tile
                sees = gl.load(seen + last + 1) > gl.load(seen + first)
                into = gl.where((into == OUT) | sees, into, NOWHERE)
        return into

    @gluon.jit
    def total(self):
        """Query tiles of all heads."""
        return self.pairs * self.group * self.tiles

    @gluon.jit
    def job(self, index):
        """Query tile number `index` and its KV tiles: at least one, or none past the last query tile.

        Tiles that see the most keys come first (`Order`). Within a tile, the index runs over heads, group by group, so
        that all SMs read the same tiles of K and V from L2. `heads_in_l2` limits the number of KV heads at a time.
        """
        TILE: gl.constexpr = self.CONSUMERS * ROWS
        total = self.total()
        taken = index < total
        index = gl.minimum(index, total - 1)

        tiles_in_l2 = self.heads_in_l2 * self.group * self.tiles
        first_pair = index // tiles_in_l2 * self.heads_in_l2
        index = index % tiles_in_l2
        heads = gl.minimum(self.heads_in_l2, self.pairs - first_pair) * self.group
        pair = first_pair + index % heads // self.group
        batch = pair // self.heads_kv
        head_kv = pair % self.heads_kv
        head = head_kv * self.group + index % self.group
        first = gl.load(self.order + batch.to(gl.int64) * self.order_stride_b + index // heads) * TILE

        last = gl.minimum(first + TILE, self.queries) - 1
        start = self.start + batch.to(gl.int64) * self.interval_stride_b
        end = self.end + batch.to(gl.int64) * self.interval_stride_b
        lo, tiles, full_from, full = tile_run(start, end, first, last, self.BLOCK_K)
        # Rows that see nothing also need a result. If batch rows differ, some have fewer tiles than `tiles`. They
        # process one that is masked throughout, since a job without tiles means the end.
        tiles = gl.where(tiles > 0, tiles, 1)  # not maximum, after which ptxas spills at D64
        # The first tile is always masked. Without edges, that is the first full tile.
        full_from = gl.where(full == tiles, 1, full_from)
        full = gl.minimum(full, tiles - 1)
        tiles = gl.where(taken, tiles, 0)
        into = self.into(batch, first, last)
        return Job(batch, head, head_kv, first, lo, tiles, tiles - full, full_from, into)


# -- the producer: one warp


@gluon.jit
def hand_over(fields, jobs, q_pipe, number, call):
    """Pass a job to a consumer, together with the queries of this number."""
    slot = number % call.CONSUMERS
    jobs.index(slot).store(fields)
    mbarrier.arrive(q_pipe.full.index(slot), count=1)


@gluon.jit
def produce(call, pipes, jobs, descriptors):
    """Start all copies of all query tiles, as far ahead as there are empty slots."""
    q_pipe, k_pipe, v_pipe, carry_pipe = pipes
    q, k, v, carry = descriptors[0], descriptors[1], descriptors[2], descriptors[3]
    q_number = 0 * call.queries  # a tensor, as loop variables must be
    loaded = 0 * call.queries
    job = call.job(gl.program_id(0))
    while job.tiles > 0:
        # In the order in which they are needed: the first consumer's queries, keys, other queries, values.
        q_pipe.load(q_number, q, job.batch, job.head, job.first_row)
        hand_over(job.fields(), jobs, q_pipe, q_number, call)
        k_pipe.load(loaded, k, job.batch, job.head_kv, call.key(job, 0))
        for who in gl.static_range(1, call.CONSUMERS):
            q_pipe.load(q_number + who, q, job.batch, job.head, job.first_row + who * ROWS)
            hand_over(job.fields(), jobs, q_pipe, q_number + who, call)
        v_pipe.load(loaded, v, job.batch, job.head_kv, call.key(job, 0))
        following = next_tile(call.counter, call.total())  # early, so that the next queries need not wait for it
        for step in range(1, job.tiles):
            key = call.key(job, step)
            k_pipe.load(loaded + step, k, job.batch, job.head_kv, key)
            v_pipe.load(loaded + step, v, job.batch, job.head_kv, key)
        if call.CARRY and not call.DIRECT:
            # A consumer releases its slot when it starts the tile, one use ahead of the pipe's count.
            for who in gl.static_range(call.CONSUMERS):
                carry_pipe.wait_empty(q_number + who + call.CONSUMERS)
                carry_pipe.copy(q_number + who, carry, job.batch, job.head, job.first_row + who * ROWS)
        loaded += job.tiles
        q_number += call.CONSUMERS
        job = call.job(following)
    for who in gl.static_range(call.CONSUMERS):
        number = q_number + who
        q_pipe.wait_empty(number)
        mbarrier.arrive(q_pipe.full.index(number % call.CONSUMERS), count=1)
        hand_over(job.fields(), jobs, q_pipe, number, call)


# -- the consumers: a warpgroup each


@gluon.jit
def score_operands(q_tile, call):
    """The left operands of the scores: a consumer's queries in shared memory; at head_dim 256, half in registers."""
    Q: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product_layout(call.BLOCK_K), k_width=2)
    return (q_tile.slice(0, HELD, 1).load(Q), q_tile.slice(HELD, HELD, 1)) if call.D == 256 else (q_tile,)


@gluon.jit
def begin_scores(q, k_pipe, number, call, WHO: gl.constexpr):
    """Start the scores of KV tile `number`, when it is this consumer's turn. Returns a product in flight."""
    S: gl.constexpr = product_layout(call.BLOCK_K)
    zeros = gl.zeros([ROWS, call.BLOCK_K], gl.float32, S)
    sync(TURN + WHO, 256, 4)  # the consumer before this one
    k = k_pipe.tile(number).permute((1, 0))
    if call.D == 256:
        scores = warpgroup_mma(q[0], k.slice(0, HELD, 0), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma(q[1], k.slice(HELD, HELD, 0), scores, is_async=True)
    else:
        scores = warpgroup_mma(q[0], k, zeros, use_acc=False, is_async=True)
    arrive(TURN + (WHO + 1) % call.CONSUMERS, 256)
    return scores


@gluon.jit
def begin_output(acc, p, alpha, v_pipe, number, call):
    """Start acc = a acc + p v for KV tile `number`, with p in registers. Returns a product in flight."""
    dtype: gl.constexpr = v_pipe.tiles.dtype
    weights = unpacked(p, dtype) if call.GUESS else p.to(dtype)
    acc = scale_rows(acc, alpha)
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    weights = gl.convert_layout(weights, A)
    v_pipe.wait_full(number)  # the copy engine
    return warpgroup_mma(weights, v_pipe.tile(number), acc, is_async=True)


@gluon.jit
def step(
    acc, p, m, z, alpha, q, k_pipe, v_pipe, number, more, key, row_start, row_end, call,
    WHO: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Scores and weights of KV tile `number`, and acc = a acc + p v of the previous tile.

    more: whether another tile follows. The wait for its keys comes right after the softmax. It is a loop, across which
    ptxas does not move code; otherwise ptxas would move the softmax below the products that it should overlap with.
    """
    if call.GUESS:
        dtype: gl.constexpr = v_pipe.tiles.dtype
        output = begin_output(acc, p, alpha, v_pipe, number - 1, call)
        scores = begin_scores(q, k_pipe, number, call, WHO)
        acc = warpgroup_mma_wait(1, deps=(output,))  # the tensor cores, for the older of two products
        v_pipe.release(number - 1)
        s = warpgroup_mma_wait(0, deps=(scores,))  # the tensor cores
        k_pipe.release(number)
        if EDGE:
            p, m, z, alpha = softmax_step(s, m, z, key, row_start, row_end, call, EDGE)
            k_pipe.wait_full(number + 1, more)  # the copy engine
            p = packed(p, dtype)
        else:
            p, m, z, alpha = guess_step(s, m, z, call, dtype)
            k_pipe.wait_full(number + 1, more)  # the copy engine
    else:
        # acc is scaled and p is rounded under the scores, once these are in flight.
        scores = begin_scores(q, k_pipe, number, call, WHO)
        output = begin_output(acc, p, alpha, v_pipe, number - 1, call)
        s = warpgroup_mma_wait(1, deps=(scores,))  # the tensor cores, for the older of two products
        k_pipe.release(number)
        p, m, z, alpha = softmax_step(s, m, z, key, row_start, row_end, call, EDGE)
        k_pipe.wait_full(number + 1, more)  # the copy engine
        acc = warpgroup_mma_wait(0, deps=(output,))  # the tensor cores
        v_pipe.release(number - 1)
    return acc, p, m, z, alpha


@gluon.jit
def consume(call, pipes, jobs, descriptors, WHO: gl.constexpr):
    """A consumer: the 64 rows from WHO x 64 of every query tile of this program."""
    q_pipe, k_pipe, v_pipe, carry_pipe = pipes
    out, final = descriptors[4], descriptors[5]
    S: gl.constexpr = product_layout(call.BLOCK_K)
    A: gl.constexpr = product_layout(call.D)
    if WHO == call.CONSUMERS - 1:
        arrive(TURN, 256)
    q_number = 0 * call.queries + WHO
    number = 0 * call.queries
    q_pipe.wait_full(q_number)  # the copy engine and the producer
    job = receive_job(jobs.index(WHO))
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
        q_tile = q_pipe.tile(q_number)
        k_pipe.wait_full(number)  # the copy engine
        q = score_operands(q_tile, call)
        scores = begin_scores(q, k_pipe, number, call, WHO)
        if not call.DIRECT:
            tma.store_wait(0)  # the copy engine, which reads that result
            if call.CARRY:
                carry_pipe.release(q_number)
        s = warpgroup_mma_wait(0, deps=(scores,))  # the tensor cores
        k_pipe.release(number)
        key = call.key(job, 0)
        p, m, z, alpha = softmax_step(s, m, z, key, row_start, row_end, call, EDGE=True)
        k_pipe.wait_full(number + 1, job.tiles > 1)
        if call.GUESS:
            p = packed(p, v_pipe.tiles.dtype)

        # 2. The other edge tiles.
        for i in range(1, job.edges):
            acc, p, m, z, alpha = step(
                acc, p, m, z, alpha, q, k_pipe, v_pipe, number + i, i + 1 < job.tiles,
                call.key(job, i), row_start, row_end, call, WHO, EDGE=True,
            )  # fmt: skip

        # 3. Full tiles: no mask.
        if call.GUESS:
            m, z, alpha = to_threads(m, z, alpha, call.BLOCK_K)
        for i in range(job.edges, job.tiles):
            acc, p, m, z, alpha = step(
                acc, p, m, z, alpha, q, k_pipe, v_pipe, number + i, i + 1 < job.tiles,
                0, 0, 0, call, WHO, EDGE=False,
            )  # fmt: skip
        if call.GUESS:
            m, z = to_rows(m, z, call.BLOCK_K)

        # 4. The last tile's values. Under them, the carried lse arrives.
        number += job.tiles
        job = receive_job(jobs.index(WHO))  # read again, so that the loops need not keep it in registers
        q_pipe.release(q_number)
        output = begin_output(acc, p, alpha, v_pipe, number - 1, call)
        valid = rows < call.queries
        lse = call.lse + job.batch.to(gl.int64) * call.lse_stride_b + job.head.to(gl.int64) * call.lse_stride_h
        m_carry = m
        if call.CARRY:
            m_carry = gl.load(lse + rows, valid, NEG_INF) * LOG2_E_
        acc = warpgroup_mma_wait(0, deps=(output,))  # the tensor cores
        v_pipe.release(number - 1)
        first_row = job.first_row + WHO * ROWS
        acc, total = result(acc, m, z, m_carry, carry_pipe, q_number, descriptors[3], job, first_row, call)
        gl.store(lse + rows, total, valid)
        if call.FINISHES:
            if job.into == OUT:
                write(acc, out, call.out_stride_b, call.out_stride_s, call.out_stride_h, carry_pipe, q_number, job,
                      first_row, call)  # fmt: skip
            elif job.into == FINAL:
                write(acc, final, call.final_stride_b, call.final_stride_s, call.final_stride_h, carry_pipe, q_number,
                      job, first_row, call)  # fmt: skip
        else:
            write(acc, out, call.out_stride_b, call.out_stride_s, call.out_stride_h, carry_pipe, q_number, job,
                  first_row, call)  # fmt: skip

        q_number += call.CONSUMERS
        q_pipe.wait_full(q_number)  # the copy engine and the producer
        job = receive_job(jobs.index(WHO))
    if not call.DIRECT:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "lse_stride_b", "lse_stride_h", "carry_stride_b", "carry_stride_s", "carry_stride_h", "out_stride_b",
    "out_stride_s", "out_stride_h", "final_stride_b", "final_stride_s", "final_stride_h", "seen_stride_b",
    "seen_later", "interval_stride_b", "order_stride_b", "tiles", "queries", "heads_kv", "group",
    "pairs", "heads_in_l2", "c", "cap_scale",
])  # fmt: skip
def forward_kernel(
    q, k, v, carry, out, final,
    carry_stride_b, carry_stride_s, carry_stride_h, out_stride_b, out_stride_s, out_stride_h,
    final_stride_b, final_stride_s, final_stride_h, seen, seen_stride_b, seen_later,
    lse, lse_stride_b, lse_stride_h,
    start, end, interval_stride_b, counter, order, order_stride_b, tiles,
    queries, heads_kv, group, pairs, heads_in_l2, c, cap_scale,
    D: gl.constexpr, BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    CAPPED: gl.constexpr, CARRY: gl.constexpr, DIRECT: gl.constexpr, FINISHES: gl.constexpr,
):  # fmt: skip
    """Allocate shared memory and barriers, and start each group of warps. All but lse are [B, H, S, D] for TMA."""
    call = Call(
        lse, lse_stride_b, lse_stride_h, carry_stride_b, carry_stride_s, carry_stride_h, out_stride_b, out_stride_s,
        out_stride_h, final_stride_b, final_stride_s, final_stride_h, seen, seen_stride_b, seen_later,
        start, end, interval_stride_b, counter, order, order_stride_b, tiles, queries, heads_kv, group,
        pairs, heads_in_l2, c, cap_scale, D, BLOCK_K, CONSUMERS, CAPPED, CARRY, D != 128, DIRECT, FINISHES,
    )  # fmt: skip
    q_pipe = make_pipe(q.dtype, CONSUMERS, ROWS, D, WRITERS=2)
    jobs = gl.allocate_shared_memory(gl.int32, [CONSUMERS, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_pipe = make_pipe(q.dtype, STAGES, BLOCK_K, D, CONSUMERS, K_EMPTY)
    v_pipe = make_pipe(q.dtype, STAGES, BLOCK_K, D, CONSUMERS, V_EMPTY)
    # If not DIRECT, out is also stored through it.
    carry_pipe = q_pipe if DIRECT else make_pipe(carry.dtype, CONSUMERS, ROWS, D, READERS=1 if CARRY else 0)
    pipes = (q_pipe, k_pipe, v_pipe, carry_pipe)
    descriptors = (q, k, v, carry, out, final)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (call, pipes, jobs, descriptors, 0)),
                (consume, (call, pipes, jobs, descriptors, 1)),
                (produce, (call, pipes, jobs, descriptors)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (call, pipes, jobs, descriptors, 0)),
                (consume, (call, pipes, jobs, descriptors, 1)),
                (consume, (call, pipes, jobs, descriptors, 2)),
                (produce, (call, pipes, jobs, descriptors)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )


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
        check_rows(q, **{"carry.out": carry.out, "carry.lse": carry.lse})
    if out is not None:
        check_out("hopper", q, out)
        check_addresses(out=out)
    check_seen("hopper", q, seen)
    if 0 in q.shape or 0 in k.shape:
        return result_without_keys(q, carry, out, seen)

    B, Sq, Hq, D = q.shape
    Hkv = k.shape[2]
    state, final = outputs(q, carry, out, seen)
    out, lse, carried = state.out, state.lse, (state if carry is None else carry).out
    t = tuning or TUNINGS[D]
    registers = REGISTERS[t.consumers]
    order = intervals.query_order[t.consumers * ROWS.value]
    in_place = carry is not None and carried is out  # then tiles that see nothing already have their result
    q_tiles = order.nonempty if in_place else order.tiles.shape[1]
    if not q_tiles:
        return state
    direct = D > 128
    out_tiles = out if direct else tiles(out, ROWS.value)
    carry_tiles, final_tiles = (
        out_tiles if x is out else x if direct else tiles(x, ROWS.value) for x in (carried, final)
    )
    with torch.cuda.device_of(q):
        forward_kernel[(min(B * Hq * q_tiles, sm_count(q.device)),)](
            *(tiles(q, ROWS.value), tiles(k, t.block_k), tiles(v, t.block_k)),
            *(carry_tiles, out_tiles, final_tiles, *carried.stride()[:3], *out.stride()[:3], *final.stride()[:3]),
            *seen_argument(seen, lse),
            *(lse, *lse.stride()[:2]),
            *(intervals.start, intervals.end, interval_stride(intervals.start)),
            *(counter(q.device), order.tiles, interval_stride(order.tiles), q_tiles),
            *(Sq, Hkv, Hq // Hkv, B * Hkv, min(heads_in_l2(q, k), B * Hkv), *score_scales(scale, softcap)),
            D=D, BLOCK_K=t.block_k, CONSUMERS=t.consumers,
            CONSUMER_REGISTERS=registers.consumer, PRODUCER_REGISTERS=registers.producer,
            CAPPED=softcap is not None, CARRY=carry is not None, DIRECT=direct, FINISHES=final is not out,
            num_warps=4, maxnreg=registers.launch, enable_fp_fusion=True,
        )  # fmt: skip
    return state


def heads_in_l2(q: Tensor, k: Tensor) -> int:
    """The number of (batch row, KV head) pairs at a time: as many as keep K and V in L2, and at least 8 query heads.

    With fewer, SMs work on query tiles of more different lengths, and no longer read the same keys at the same time.
    With 16 query and KV heads at 32k tokens, 2 heads had 591 TFLOP/s, 4 660, 8 712 and 16 684.
    """
    _, Skv, Hkv, D = k.shape
    return max(-(-8 * Hkv // q.shape[2]), L2_BYTES // (2 * Skv * D * k.element_size()))
