"""Attention forward for Hopper (sm_90), in Gluon: the mathematics of `portable_forward`, scheduled by hand.

One program an SM walks the query tiles that are its share. A query tile is 2 x 64 rows of one head; a consumer, which
is a warpgroup (4 warps, the unit that issues wgmma), owns 64 of them. For a row, with s = q k^T, c = scale log2(e) and
the softmax state (m, z, acc):

    m' = max(m, c max_j s_j)    p_j = 2^(c s_j - m')    a = 2^(m - m')    z' = a z + sum_j p_j    acc' = a acc + p v

at the end out = acc / z, lse = ln(2) (m + log2 z); a carried Partial is such a state and joins there. See
`portable_forward` for the softcap. `start` and `end` never decrease, so a tile's bounds say which KV tiles its rows
see whole (full) and which only in part (edges):

    keys      lo ......... full_from ........................ hi
    tiles     | edge | edge |  full  |  full  |  full  | edge | edge |
    walked        1      2       5        6        7       3     4

Edges come first: the first tile is computed before the loops begin and masked in any case, and a row's bounds are out
of the registers when the full tiles run. Their loop is the same code whatever the mask.

Who waits for what. The producer is one warp that does nothing but order copies; consumers A and B take turns, so that
the tensor cores run one's products under the other's exponentials (two named barriers, the ping-pong):

    copy engine     k3 v2             k4 v3             k5 v4
    tensor cores    A: q k2, p1 v1  | B: q k2, p1 v1  | A: q k3, p2 v2  | B: q k3, p2 v2
    A               ............... | p2 = 2^(..)     | ............... | p3 = 2^(..)
    B               p1 = 2^(..)     | ............... | p2 = 2^(..)     | ...............
"""

# Annotations stay objects in this file (no `from __future__ import annotations`): Triton reads those of aggregates.
import functools
from dataclasses import dataclass

import torch
import triton
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringflash.kernels import portable_forward
from ringflash.kernels.gluon_names import TESTED, aggregate, copy_in, copy_out, reinterpret, triton_version
from ringflash.kernels.portable_forward import LOG2_E, arch, interval_stride, score_scales, tma_refusal
from ringflash.mask import Intervals
from ringflash.partial import Partial

ROWS = gl.constexpr(64)  # of a consumer's query tile: what one wgmma computes
CONSUMERS = gl.constexpr(2)
LOG2_E_ = gl.constexpr(LOG2_E)
LN_2 = gl.constexpr(0.6931471805599453)
NEG_INF = gl.constexpr(float("-inf"))
FIRST_BARRIER = 8  # of the 16 that warps meet at by number. Triton takes those from 0: one a partition, two of its own
TURN = gl.constexpr(FIRST_BARRIER)  # one a consumer, which it shares with the other
L2_BYTES = 32 << 20  # of 50 MB: K and V of the heads worked on at a time; the rest is for what streams through
REGISTERS = 65536  # of an SM
LAUNCH_REGISTERS = 168  # a thread at launch: REGISTERS over three warpgroups, before these trade them
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


@dataclass(frozen=True)
class Tuning:
    """How one launch is cut up: two consumers with 64 query rows each."""

    block_k: int  # keys of a step: a power of two, 16 to 256
    stages: int  # K tiles, and V tiles, in shared memory
    consumer_registers: int = 240  # a thread, by setmaxnreg: multiples of 8
    producer_registers: int = 24

    def __post_init__(self) -> None:
        if self.block_k not in (16, 32, 64, 128, 256):
            raise ValueError(f"block_k must be a power of two from 16 to 256, got {self.block_k}")
        check_registers(self.consumer_registers, self.producer_registers)


def check_registers(consumer: int, producer: int) -> None:
    """Raise ValueError unless setmaxnreg takes both, and two consumers and a producer fit an SM."""
    used = 128 * (CONSUMERS.value * consumer + producer)  # the producer's warp is padded to a warpgroup
    if used > REGISTERS or consumer % 8 or producer % 8:
        raise ValueError(
            f"registers must be multiples of 8, and those of 2 consumers and a producer at most {REGISTERS}, "
            f"got {consumer} and {producer} a thread: {used}"
        )


TUNINGS = {
    # Three consumers of 160 registers came out the same as two of 240, within the noise, and need p packed to fit.
    64: Tuning(block_k=128, stages=2),
    # Scores and p 64 registers a thread, acc 64, p in flight 32. 224 of 227 KB with a carry; 64 keys: 15% slower.
    128: Tuning(block_k=128, stages=2),
}


# -- barriers that warps meet at by number: a warp arrives and goes on, where an mbarrier would have its warpgroup meet


@gluon.constexpr_function
def barrier_asm(verb, threads):
    """PTX for one thread."""
    return f"bar.{verb} $1, {threads}; mov.u32 $0, $1;"


@gluon.jit
def sync(barrier, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """Wait, with all WARPS of this partition, until THREADS have come to the barrier. Each thread has one element."""
    thread = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    asm: gl.constexpr = barrier_asm("sync", THREADS)
    gl.inline_asm_elementwise(asm, "=r,r", [thread * 0 + barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def arrive(barrier, THREADS: gl.constexpr):
    """Come to the barrier, with the four warps of this partition, without waiting."""
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    asm: gl.constexpr = barrier_asm("arrive", THREADS)
    gl.inline_asm_elementwise(asm, "=r,r", [thread * 0 + barrier], dtype=gl.int32, is_pure=False, pack=1)


# -- shared memory on its way from one warp to another


@aggregate
class Pipe:
    """DEPTH tiles of shared memory. Tiles are numbered from 0 as they come; number n lies in slot n % DEPTH.

    full[slot] is signalled by the copy engine when all bytes have landed, empty[slot] by each reader when it is done.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    DEPTH: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, tiles, full, empty, DEPTH):
        self.tiles = tiles
        self.full = full
        self.empty = empty
        self.DEPTH = gl.constexpr(DEPTH)

    @gluon.jit
    def tile(self, number):
        """The shared memory of a tile."""
        return self.tiles.index(number % self.DEPTH)

    @gluon.jit
    def wait_full(self, number, pred=True):
        """Wait for the copy engine to have filled a tile."""
        mbarrier.wait(self.full.index(number % self.DEPTH), number // self.DEPTH & 1, pred=pred)

    @gluon.jit
    def wait_empty(self, number):
        """Wait for the readers of the tile that had the slot before."""
        mbarrier.wait(self.empty.index(number % self.DEPTH), (number // self.DEPTH & 1) ^ 1)

    @gluon.jit
    def release(self, number):
        """Say that this warpgroup has read a tile."""
        mbarrier.arrive(self.empty.index(number % self.DEPTH), count=1)

    @gluon.jit
    def load(self, number, descriptor, batch, head, row):
        """Order the copy of a tile from row `row` of a [B, H, S, D] tensor, once its slot is empty."""
        self.wait_empty(number)
        full = self.full.index(number % self.DEPTH)
        mbarrier.expect(full, descriptor.block_type.nbytes)
        copy_in(descriptor, [batch, head, row, 0], full, self.tiles.index(number % self.DEPTH))


@gluon.jit
def make_pipe(dtype: gl.constexpr, DEPTH: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, readers: gl.constexpr):
    """A Pipe of [BLOCK, D] tiles, each released by `readers` warpgroups."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], dtype)
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(dtype, [DEPTH, BLOCK, D], layout)
    full = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], barrier_layout)
    empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], barrier_layout)
    for slot in gl.static_range(DEPTH):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=readers)
    return Pipe(tiles, full, empty, DEPTH)


# -- which tiles a program works on


@aggregate
class Job:
    """A tile of rows and the tiles of columns they see: `edges` that are masked, then the full ones.

    Rows and columns are queries and keys in the forward, keys and queries in the backward.
    """

    batch: gl.tensor
    head: gl.tensor
    head_kv: gl.tensor
    first: gl.tensor
    lo: gl.tensor
    tiles: gl.tensor
    edges: gl.tensor
    full_from: gl.tensor

    @gluon.constexpr_function
    def __init__(self, batch, head, head_kv, first, lo, tiles, edges, full_from):
        self.batch = batch
        self.head = head
        self.head_kv = head_kv
        self.first = first
        self.lo = lo
        self.tiles = tiles
        self.edges = edges
        self.full_from = full_from

    @gluon.jit
    def column(self, step, BLOCK: gl.constexpr):
        """The first column of the tile walked as number `step`."""
        edge = gl.where(step < self.full_from, step, step + self.tiles - self.edges)
        return self.lo + gl.where(step < self.edges, edge, self.full_from + step - self.edges) * BLOCK


@gluon.jit
def tile_run(start, end, first, last, BLOCK: gl.constexpr):
    """The tiles that rows first..last see: where they begin, how many, and which and how many every row sees whole."""
    lo = gl.load(start + first)
    hi = gl.load(end + last)
    all_from = gl.load(start + last)
    all_to = gl.load(end + first)
    tiles = gl.cdiv(hi - lo, BLOCK)
    full_from = gl.minimum(gl.cdiv(all_from - lo, BLOCK), tiles)
    return lo, tiles, full_from, gl.maximum((all_to - lo) // BLOCK, full_from) - full_from


@aggregate
class Call:
    """The scalars and pointers of a call, and its constants."""

    lse: gl.tensor
    lse_stride_b: gl.tensor
    lse_stride_h: gl.tensor
    start: gl.tensor
    end: gl.tensor
    interval_stride_b: gl.tensor
    queries: gl.tensor
    heads_kv: gl.tensor
    group: gl.tensor  # query heads of a KV head
    pairs: gl.tensor  # batch rows x KV heads
    section: gl.tensor  # pairs worked on at a time
    c: gl.tensor
    cap_scale: gl.tensor
    D: gl.constexpr
    BLOCK_K: gl.constexpr
    CAPPED: gl.constexpr
    CARRY: gl.constexpr
    IN_PLACE: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, lse, lse_stride_b, lse_stride_h, start, end, interval_stride_b, queries, heads_kv, group, pairs, section,
        c, cap_scale, D, BLOCK_K, CAPPED, CARRY, IN_PLACE,
    ):  # fmt: skip
        self.lse = lse
        self.lse_stride_b = lse_stride_b
        self.lse_stride_h = lse_stride_h
        self.start = start
        self.end = end
        self.interval_stride_b = interval_stride_b
        self.queries = queries
        self.heads_kv = heads_kv
        self.group = group
        self.pairs = pairs
        self.section = section
        self.c = c
        self.cap_scale = cap_scale
        self.D = gl.constexpr(D)
        self.BLOCK_K = gl.constexpr(BLOCK_K)
        self.CAPPED = gl.constexpr(CAPPED)
        self.CARRY = gl.constexpr(CARRY)
        self.IN_PLACE = gl.constexpr(IN_PLACE)

    @gluon.jit
    def turns(self):
        """How often each program takes a query tile."""
        q_tiles = gl.cdiv(self.queries, CONSUMERS * ROWS)
        return gl.cdiv(self.pairs * self.group * q_tiles, gl.num_programs(0))

    @gluon.jit
    def job(self, turn):
        """What this program works on in a turn.

        Tiles are dealt out longest first, back and forth (0 1 2, 2 1 0, 0 1 2), so that every program gets its share
        of the long ones. Under a causal mask a tile is longer the later it begins; under documents its length is
        anybody's guess, but a long document's tiles are neighbours, and neighbours go to different programs. Which
        is enough: no counter in memory, no order computed before the launch.

        Heads run fastest, those of a group first, so that the tiles of K and V that all SMs read at a time come from
        L2; `section` bounds how many KV heads that are.
        """
        programs = gl.num_programs(0)
        program = gl.program_id(0)
        q_tiles = gl.cdiv(self.queries, CONSUMERS * ROWS)
        total = self.pairs * self.group * q_tiles
        dealt = turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)
        index = gl.minimum(dealt, total - 1)

        of_section = self.section * self.group * q_tiles
        section = index // of_section
        index = index % of_section
        heads = gl.minimum(self.section, self.pairs - section * self.section) * self.group
        first = (q_tiles - 1 - index // heads) * (CONSUMERS * ROWS)
        pair = section * self.section + index % heads // self.group
        batch = pair // self.heads_kv
        head_kv = pair % self.heads_kv
        head = head_kv * self.group + index % self.group

        last = gl.minimum(first + CONSUMERS * ROWS, self.queries) - 1
        start = self.start + batch.to(gl.int64) * self.interval_stride_b
        end = self.end + batch.to(gl.int64) * self.interval_stride_b
        lo, tiles, full_from, full = tile_run(start, end, first, last, self.BLOCK_K)
        if not self.IN_PLACE:
            tiles = gl.maximum(tiles, 1)  # rows that see nothing have a result to write, too
        # The first tile walked is masked. Where no tile needs it, that is the first of the full ones.
        full_from = gl.where(full == tiles, 1, full_from)
        full = gl.minimum(full, tiles - 1)
        tiles = gl.where(dealt < total, tiles, 0)
        return Job(batch, head, head_kv, first, lo, tiles, tiles - full, full_from)


# -- the producer: one warp


@gluon.jit
def produce(call, pipes, descriptors):
    """Order every copy of every turn, as far ahead as there are empty slots: waits for consumers only."""
    q_pipe, k_pipe, v_pipe, carry_pipe = pipes
    q, k, v, carry = descriptors[0], descriptors[1], descriptors[2], descriptors[3]
    worked = 0
    loaded = 0
    for turn in range(call.turns()):
        job = call.job(turn)
        if job.tiles > 0:
            # In the order of need: A's queries, the keys, B's queries, the values.
            q_number = worked * CONSUMERS
            q_pipe.load(q_number, q, job.batch, job.head, job.first)
            k_pipe.load(loaded, k, job.batch, job.head_kv, job.column(0, call.BLOCK_K))
            for who in gl.static_range(1, CONSUMERS):
                q_pipe.load(q_number + who, q, job.batch, job.head, job.first + who * ROWS)
            v_pipe.load(loaded, v, job.batch, job.head_kv, job.column(0, call.BLOCK_K))
            if call.CARRY:
                for who in gl.static_range(CONSUMERS):
                    carry_pipe.load(q_number + who, carry, job.batch, job.head, job.first + who * ROWS)
            for step in range(1, job.tiles):
                key = job.column(step, call.BLOCK_K)
                k_pipe.load(loaded + step, k, job.batch, job.head_kv, key)
                v_pipe.load(loaded + step, v, job.batch, job.head_kv, key)
            loaded += job.tiles
            worked += 1


# -- the consumers: a warpgroup each


@gluon.jit
def visible(start, end, index):
    """Which of the indices lie in each row's start:end, [rows, indices]. One comparison: unsigned wraps below start."""
    past_start = (gl.expand_dims(index, 0) - gl.expand_dims(start, 1)).to(gl.uint32, bitcast=True)
    return past_start < gl.expand_dims((end - start).to(gl.uint32, bitcast=True), 1)


@gluon.jit
def cap(s, cap_scale):
    """tanh(s scale / softcap), with cap_scale = 2 log2(e) scale / softcap."""
    return 1.0 - 2.0 / (1.0 + gl.exp2(s * cap_scale))


@gluon.jit
def softmax_step(s, m, z, key, row_start, row_end, call, EDGE: gl.constexpr):
    """Fold a tile of scores into a row's maximum and sum: the weights p, the new m and z, and what acc is scaled by."""
    if call.CAPPED:
        s = cap(s, call.cap_scale)
    if EDGE:
        keys = key + gl.arange(0, call.BLOCK_K, layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where(visible(row_start, row_end, keys), s, NEG_INF)
    m_new = gl.maximum(m, gl.max(s, 1) * call.c)
    shift = m_new
    if EDGE:
        shift = gl.where(m_new == NEG_INF, 0.0, m_new)  # a row that has seen nothing: -inf - -inf would be NaN
    p = gl.exp2(s * call.c - gl.expand_dims(shift, 1))
    alpha = gl.exp2(m - shift)
    return p, m_new, z * alpha + gl.sum(p, 1), alpha


@gluon.jit
def begin_output(acc, p, alpha, v_pipe, number, dtype: gl.constexpr):
    """Start acc = a acc + p v for KV tile `number`, p in 16 bits from registers: a product in flight."""
    A: gl.constexpr = acc.type.layout
    weights = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(operand_index=0, parent=A, k_width=2))
    acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, A)), 1)
    v_pipe.wait_full(number)  # the copy engine
    return warpgroup_mma(weights, v_pipe.tile(number), acc, is_async=True)


@gluon.jit
def begin_scores(q_tile, k_pipe, number, call, WHO: gl.constexpr):
    """Start the scores of KV tile `number`, when it is this consumer's turn: a product in flight."""
    S: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, call.BLOCK_K, 16]
    )
    zeros = gl.zeros([ROWS, call.BLOCK_K], gl.float32, S)
    sync(TURN + WHO, 256, 4)  # the other consumer
    scores = warpgroup_mma(q_tile, k_pipe.tile(number).permute((1, 0)), zeros, use_acc=False, is_async=True)
    arrive(TURN + 1 - WHO, 256)
    return scores


@gluon.jit
def step(
    acc, p, m, z, alpha, q_tile, k_pipe, v_pipe, number, more, key, row_start, row_end, call,
    WHO: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Scores of KV tile `number` and acc = a acc + p v of the one before it, under the other consumer's exponentials.

    Rescaling acc and rounding p wait until the scores are on their way, and run under them. more: whether another tile
    follows. Waiting for its keys between the softmax and the wait for acc is what keeps ptxas from moving the softmax
    below that wait, where nothing would run under it: it does not move code over a loop.
    """
    scores = begin_scores(q_tile, k_pipe, number, call, WHO)
    output = begin_output(acc, p, alpha, v_pipe, number - 1, q_tile.dtype)
    s = warpgroup_mma_wait(1, deps=(scores,))  # the tensor cores, for the older of two products
    k_pipe.release(number)
    p, m, z, alpha = softmax_step(s, m, z, key, row_start, row_end, call, EDGE)
    k_pipe.wait_full(number + 1, more)  # the copy engine
    acc = warpgroup_mma_wait(0, deps=(output,))  # the tensor cores
    v_pipe.release(number - 1)
    return acc, p, m, z, alpha


@gluon.jit
def consume(call, pipes, descriptors, WHO: gl.constexpr):
    """Rows WHO x 64 and on of every query tile of this program."""
    q_pipe, k_pipe, v_pipe, carry_pipe = pipes
    q, out = descriptors[0], descriptors[4]
    S: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, call.BLOCK_K, 16]
    )
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, call.D, 16])
    if WHO == CONSUMERS - 1:
        arrive(TURN, 256)
    worked = 0
    number = 0
    for turn in range(call.turns()):
        job = call.job(turn)
        if job.tiles > 0:
            start = call.start + job.batch.to(gl.int64) * call.interval_stride_b
            end = call.end + job.batch.to(gl.int64) * call.interval_stride_b
            rows = job.first + WHO * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
            row_start = gl.load(start + rows, rows < call.queries, 0)
            row_end = gl.load(end + rows, rows < call.queries, 0)
            m = gl.full([ROWS], NEG_INF, gl.float32, gl.SliceLayout(1, S))
            z = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
            acc = gl.zeros([ROWS, call.D], gl.float32, A)

            # 1. The first tile: scores only.
            q_number = worked * CONSUMERS + WHO
            q_tile = q_pipe.tile(q_number)
            q_pipe.wait_full(q_number)  # the copy engine
            k_pipe.wait_full(number)
            scores = begin_scores(q_tile, k_pipe, number, call, WHO)
            s = warpgroup_mma_wait(0, deps=(scores,))  # the tensor cores
            k_pipe.release(number)
            key = job.column(0, call.BLOCK_K)
            p, m, z, alpha = softmax_step(s, m, z, key, row_start, row_end, call, EDGE=True)
            k_pipe.wait_full(number + 1, job.tiles > 1)

            # 2. The other tiles that only some rows see.
            for i in range(1, job.edges):
                acc, p, m, z, alpha = step(
                    acc, p, m, z, alpha, q_tile, k_pipe, v_pipe, number + i, i + 1 < job.tiles,
                    job.column(i, call.BLOCK_K), row_start, row_end, call, WHO, EDGE=True,
                )  # fmt: skip

            # 3. Tiles that every row sees whole: no mask.
            for i in range(job.edges, job.tiles):
                acc, p, m, z, alpha = step(
                    acc, p, m, z, alpha, q_tile, k_pipe, v_pipe, number + i, i + 1 < job.tiles,
                    0, 0, 0, call, WHO, EDGE=False,
                )  # fmt: skip

            # 4. The last tile's values.
            q_pipe.release(q_number)
            number += job.tiles
            output = begin_output(acc, p, alpha, v_pipe, number - 1, q.dtype)
            acc = warpgroup_mma_wait(0, deps=(output,))  # the tensor cores
            v_pipe.release(number - 1)

            finish(acc, m, z, rows, job, carry_pipe, q_number, out, call, WHO)
            worked += 1
    tma.store_wait(0)


@gluon.jit
def finish(acc, m, z, rows, job, carry_pipe, number, out, call, WHO: gl.constexpr):
    """Join the carried state and write out and lse. The copy engine clips rows past the end."""
    A: gl.constexpr = acc.type.layout
    valid = rows < call.queries
    lse = call.lse + job.batch.to(gl.int64) * call.lse_stride_b + job.head.to(gl.int64) * call.lse_stride_h
    staged = carry_pipe.tile(number)
    if call.CARRY:
        m_carry = gl.load(lse + rows, valid, NEG_INF) * LOG2_E_
        m_new = gl.maximum(m, m_carry)
        shift = gl.where(m_new == NEG_INF, 0.0, m_new)
        alpha = gl.exp2(m - shift)
        alpha_carry = gl.exp2(m_carry - shift)
        z = z * alpha + alpha_carry
        m = m_new
        carry_pipe.wait_full(number)  # the copy engine
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, A)), 1)
        acc += staged.load(A) * gl.expand_dims(gl.convert_layout(alpha_carry, gl.SliceLayout(1, A)), 1)
    else:
        tma.store_wait(0)  # the copy engine, reading the tile before out of the same shared memory
    seen = z > 0
    z = gl.where(seen, z, 1.0)  # a row that has seen nothing: acc is 0 already
    gl.store(lse + rows, gl.where(seen, (m + gl.log2(z)) * LN_2, NEG_INF), valid)
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / z, gl.SliceLayout(1, A)), 1)
    if staged.dtype != out.dtype:
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, call.D], out.dtype)
        staged = reinterpret(staged, out.dtype, [ROWS, call.D], layout)
    staged.store(acc.to(out.dtype))
    fence_async_shared()  # what threads wrote, made visible to the copy engine
    copy_out(out, [job.batch, job.head, job.first + WHO * ROWS, 0], staged)
    if call.CARRY:
        tma.store_wait(0)  # the copy engine, before the next carry may land here
        carry_pipe.release(number)


@gluon.jit
def consume_0(call, pipes, descriptors):
    """The first consumer."""
    consume(call, pipes, descriptors, 0)


@gluon.jit
def consume_1(call, pipes, descriptors):
    """The second consumer."""
    consume(call, pipes, descriptors, 1)


@gluon.jit(do_not_specialize=[
    "lse_stride_b", "lse_stride_h", "interval_stride_b", "queries", "heads_kv", "group", "pairs", "section",
    "c", "cap_scale",
])  # fmt: skip
def forward_kernel(
    q, k, v, carry, out,
    lse, lse_stride_b, lse_stride_h,
    start, end, interval_stride_b,
    queries, heads_kv, group, pairs, section, c, cap_scale,
    D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    CAPPED: gl.constexpr, CARRY: gl.constexpr, IN_PLACE: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers, and a function for each group of warps. q, k, v, carry, out are [B, H, S, D] for TMA."""
    call = Call(
        lse, lse_stride_b, lse_stride_h, start, end, interval_stride_b, queries, heads_kv, group, pairs, section,
        c, cap_scale, D, BLOCK_K, CAPPED, CARRY, IN_PLACE,
    )  # fmt: skip
    q_pipe = make_pipe(q.dtype, CONSUMERS, ROWS, D, readers=1)
    k_pipe = make_pipe(q.dtype, STAGES, BLOCK_K, D, readers=CONSUMERS)
    v_pipe = make_pipe(q.dtype, STAGES, BLOCK_K, D, readers=CONSUMERS)
    carry_pipe = make_pipe(carry.dtype, CONSUMERS, ROWS, D, readers=1)  # out leaves through it, too
    pipes = (q_pipe, k_pipe, v_pipe, carry_pipe)
    descriptors = (q, k, v, carry, out)
    gl.warp_specialize(
        [
            (consume_0, (call, pipes, descriptors)),
            (consume_1, (call, pipes, descriptors)),
            (produce, (call, pipes, descriptors)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
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
    out_dtype: torch.dtype = torch.float32,
    tuning: Tuning | None = None,
) -> Partial:
    """Attention over ``start:end`` of k and v, merged with carry. See `ringflash.kernels` for the contract.

    Raises ValueError, with the values, where `supports` would refuse, where v or the carry do not fit q and k, and
    where scale is not positive (a row's maximum is taken before scaling). tuning replaces the table's choice.
    """
    check_inputs(q, k, scale, softcap, v=v)
    if carry is not None:
        check_rows(q, **{"carry.out": carry.out, "carry.lse": carry.lse})
    if 0 in q.shape or 0 in k.shape:
        state = Partial.identity(q) if carry is None else carry
        return Partial(state.out.to(out_dtype), state.lse)

    B, Sq, Hq, D = q.shape
    Hkv = k.shape[2]
    if carry is not None and out_dtype == torch.float32:
        out = carry.out
    else:
        out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(B, Hq, Sq, dtype=torch.float32, device=q.device) if carry is None else carry.lse
    t = tuning or TUNINGS[D]
    q_tiles = triton.cdiv(Sq, CONSUMERS.value * ROWS.value)
    with torch.cuda.device_of(q):
        forward_kernel[(min(B * Hq * q_tiles, processors(q.device)),)](
            *(tiles(q, ROWS.value), tiles(k, t.block_k), tiles(v, t.block_k)),
            *(tiles(out if carry is None else carry.out, ROWS.value), tiles(out, ROWS.value)),
            *(lse, *lse.stride()[:2]),
            *(intervals.start, intervals.end, interval_stride(intervals.start)),
            *(Sq, Hkv, Hq // Hkv, B * Hkv, section(k), *score_scales(scale, softcap)),
            D=D, BLOCK_K=t.block_k, STAGES=t.stages,
            CONSUMER_REGISTERS=t.consumer_registers, PRODUCER_REGISTERS=t.producer_registers,
            CAPPED=softcap is not None, CARRY=carry is not None, IN_PLACE=carry is not None and out is carry.out,
            num_warps=4, maxnreg=LAUNCH_REGISTERS, enable_fp_fusion=True,
        )  # fmt: skip
    return Partial(out, lse)


def tiles(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """x [B, S, H, D] as the copy engine addresses it: [B, H, S, D] in tiles of rows x columns, by default all of D."""
    B, S, H, D = x.shape
    # A dimension of size 1 may have any stride; the copy engine wants a multiple of 16 bytes all the same.
    strides = [D if x.shape[i] == 1 else x.stride(i) for i in (0, 2, 1)]
    block = (1, 1, rows, columns or D)
    return TensorDescriptor(x, [B, H, S, D], [*strides, 1], [*block], tile_layout(block, x.dtype))


@functools.cache
def tile_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How the copy engine lays a tile out in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([*block], DTYPES[dtype])


def section(k: Tensor) -> int:
    """How many (batch row, KV head) pairs are worked on at a time, so that their K and V stay in L2."""
    _, Skv, _, D = k.shape
    return max(1, L2_BYTES // (2 * Skv * D * k.element_size()))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


# -- what can be asked for


def supports(q: Tensor, k: Tensor, softcap: float | None) -> str | None:
    """None, or why not: the tail of "kernel=hopper ..." for queries like q and keys and values like k."""
    if not q.is_cuda or arch(q) != 90:
        where = f"one of {arch(q) / 10}" if q.is_cuda else f"device {q.device}"
        return f"needs a GPU of compute capability 9.0, got {where}; kernel=portable runs on others"
    if triton_version() not in TESTED:
        return f"was tested with triton {', '.join(TESTED)}, got {triton.__version__}; kernel=portable takes any"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, got {q.dtype}; kernel=portable takes float32"
    if q.shape[3] not in TUNINGS:
        return f"takes head_dim {' and '.join(map(str, TUNINGS))}, got {q.shape[3]}; kernel=portable takes others"
    return portable_forward.supports(q, k, softcap)


def check_inputs(q: Tensor, k: Tensor, scale: float, softcap: float | None, **others: Tensor) -> None:
    """Raise ValueError unless the kernels take these; others: v as k is, dout as q is."""
    if reason := supports(q, k, softcap):
        raise ValueError(f"kernel=hopper {reason}")
    portable_forward.check_inputs(q, k, scale, softcap, **others)
    check_addresses(**others)


def check_rows(like: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless each is fp32 and [B, S, H, D] or [B, H, S] of `like`, the former as TMA takes it."""
    portable_forward.check_rows(like, **tensors)
    check_addresses(**{name: x for name, x in tensors.items() if x.dim() == 4})


def check_addresses(**tensors: Tensor) -> None:
    """Raise ValueError unless the copy engine can address each."""
    for name, x in tensors.items():
        if reason := tma_refusal(name, x):
            raise ValueError(f"kernel=hopper {reason}")
