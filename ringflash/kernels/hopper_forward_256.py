"""Warps of `hopper_forward` at head_dim 256, in Gluon: carry and out move directly between registers and memory.

A carried Partial is the softmax state from which a query tile starts, so there is nothing to merge at the tile's end:

    m = log2(e) lse - 8    z = 2^8    acc = 2^8 out

The carried out is loaded into the accumulators under the first scores and their softmax. It is needed, and multiplied
by 2^8, only when the second step scales acc. m is 8 below the logarithm of the sum so that weights that are small
beside the carried sum keep their digits in fp16.

In 16 bits, a thread stores 16 bytes of out at once. In the layout of accumulators it has 4, which takes three times as
long.

A scheduler warp takes query tiles from the counter and computes their jobs, one tile ahead of the consumers. A
consumer therefore has its next job at the end of a tile, and loads the next bounds and lse under the last product.

Of a cluster (`hopper_cluster`), program 0 copies k and program 1 copies v, each to both. A slot is filled when
it is empty in both: one program waits for the other's at its `k_other` or `v_other`. Both take the same jobs, of
neighbouring heads or query tiles. All four consumers wait for a tile that comes late, so each tile is fetched into L2
two steps ahead. Single programs gain nothing from that.
"""

# Annotations stay objects in this file (no `from __future__ import annotations`): Triton reads those of aggregates.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from ringflash.kernels.gluon_names import aggregate
from ringflash.kernels.hopper_cluster import (
    copy_to_both,
    fetch,
    next_of_cluster,
    publish_barriers,
    rank,
    signal_other,
    sync_cluster,
)
from ringflash.kernels.hopper_forward_parts import (
    BARRIERS,
    DESCRIPTOR,
    FINAL,
    FULL_AT,
    K_AT,
    K_EMPTY,
    LOG2_E_,
    OF_QUERIES,
    OTHER_AT,
    OUT,
    STAGES,
    TURN,
    V_EMPTY,
    begin_output,
    begin_scores,
    begin_turn,
    divided,
    end_turn,
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
    make_tiles,
    next_tile,
    product_layout,
    receive_job,
)

AHEAD = gl.constexpr(2)  # steps by which keys are fetched into L2
WIDE = gl.constexpr(  # rows of accumulators with 8 neighbouring columns per thread
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 256],
    )
)
CARRIED_LOG2, CARRIED_Z = gl.constexpr(8.0), gl.constexpr(2.0**8)  # z of a carry


@aggregate
class Jobs:
    """Jobs in shared memory, from the scheduler to all other warps, in two slots: number n is in slot n % 2.

    Each partition that receives a job releases it.
    """

    fields: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.jit
    def wait_empty(self, number):
        """Wait until all readers have released the slot's previous job. For the scheduler."""
        mbarrier.wait(self.empty.index(number % 2), (number // 2 & 1) ^ 1)

    @gluon.jit
    def send(self, number, job):
        """Pass on a job, whose slot is empty. For the scheduler."""
        self.fields.index(number % 2).store(job.fields())
        mbarrier.arrive(self.full.index(number % 2), count=1)

    @gluon.jit
    def receive(self, number, WARPS: gl.constexpr = 4):
        """Wait for job `number`. For a partition of WARPS."""
        mbarrier.wait(self.full.index(number % 2), number // 2 & 1)
        return self.read(number, WARPS)

    @gluon.jit
    def read(self, number, WARPS: gl.constexpr = 4):
        """Job `number`, which this partition has received and not released."""
        return receive_job(self.fields.index(number % 2), WARPS)

    @gluon.jit
    def release(self, number):
        """Release the slot of a job that this partition no longer reads."""
        mbarrier.arrive(self.empty.index(number % 2), count=1)


@aggregate
class Shared:
    """All shared memory."""

    q: Pipe
    k: Pipe
    v: Pipe
    jobs: Jobs
    k_other: gl.shared_memory_descriptor  # of a cluster: mbarriers, the other program's slot is empty
    v_other: gl.shared_memory_descriptor


@gluon.jit
def make_jobs(READERS: gl.constexpr):
    """Jobs for READERS partitions."""
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    fields = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    for slot in gl.static_range(2):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=READERS)
    return Jobs(fields, full, empty)


@gluon.jit
def make_barriers():
    """STAGES mbarriers, in an allocation so large that it comes right after the tiles (FULL_AT)."""
    barriers = gl.allocate_shared_memory(gl.int64, [BARRIERS // 8, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(barriers.index(slot), count=1)
    return barriers


@gluon.jit
def make_shared(dtype: gl.constexpr, call):
    """A program's shared memory, with initialised barriers."""
    q = make_pipe(dtype, call.CONSUMERS, ROWS, call.D, BITS=True)
    k_full, v_full = make_barriers(), make_barriers()
    k_other, v_other = k_full, v_full  # never used by single programs
    if call.CLUSTER:
        k_other, v_other = make_barriers(), make_barriers()
        publish_barriers()
    k_tiles = make_tiles(dtype, STAGES, call.BLOCK_K, call.D)
    v_tiles = make_tiles(dtype, STAGES, call.BLOCK_K, call.D)
    k = Pipe(k_tiles, k_full, k_full, STAGES, call.CONSUMERS, K_EMPTY, True)
    v = Pipe(v_tiles, v_full, v_full, STAGES, call.CONSUMERS, V_EMPTY, True)
    return Shared(q, k, v, make_jobs(READERS=call.CONSUMERS + 1), k_other, v_other)


# -- the scheduler and the producer: one warp each


@gluon.jit
def schedule(call, jobs):
    """Take query tiles, one ahead of the tile that is computed.

    Earlier would be worse: near the end of a launch, another program may be the next that is free.
    """
    if call.CLUSTER:
        sync_cluster()
    number = 0 * call.queries  # a tensor, as loop variables must be
    job = call.job(gl.program_id(0) // 2 if call.CLUSTER == OF_QUERIES else gl.program_id(0))
    while job.tiles > 0:
        jobs.send(number, job)
        number += 1
        jobs.wait_empty(number)
        if call.CLUSTER == OF_QUERIES:
            job = call.job(next_of_cluster(call.counter, number, call.total()))
        elif call.CLUSTER:
            job = call.job(2 * next_of_cluster(call.counter, number, call.total() // 2) + rank())
        else:
            job = call.job(next_tile(call.counter, call.total()))
    jobs.send(number, job)
    if call.CLUSTER:
        sync_cluster()


@gluon.jit
def load_keys(pipe, other, number, descriptor, job, key, call, WHICH: gl.constexpr):
    """Start the copy of a tile of k (WHICH 0) or v (1), once its slot is empty.

    Of a cluster, program 0 copies k and program 1 copies v, to both. At `other`, the one that copies a tile waits until
    the other program's slot is empty too.
    """
    head_kv = job.head // call.group
    if call.CLUSTER:
        DEPTH: gl.constexpr = pipe.DEPTH
        slot = number % DEPTH
        if number >= DEPTH:
            pipe.wait_empty(number)
        if rank() == WHICH:
            if number >= DEPTH:
                mbarrier.wait(other.index(slot), (number // DEPTH & 1) ^ 1)  # the other program
            mbarrier.expect(pipe.full.index(slot), descriptor.block_type.nbytes)
            for panel in gl.static_range(4):  # of 64 columns
                tile = K_AT * (1 + WHICH) + (slot * 4 + panel) * (call.BLOCK_K * 128)
                copy_to_both(
                    job.batch, head_kv, key, 64 * panel, tile, FULL_AT + WHICH * BARRIERS + slot * 8,
                    DESCRIPTOR * (1 + WHICH),
                )  # fmt: skip
        else:
            mbarrier.expect(pipe.full.index(slot), descriptor.block_type.nbytes)
            if number >= DEPTH:
                signal_other(OTHER_AT + WHICH * BARRIERS + slot * 8)
    else:
        pipe.load(number, descriptor, job.batch, head_kv, key)


@gluon.jit
def fetch_ahead(call, job, step):
    """Start to fetch a tile that a later step reads into L2: of k by program 0 of a cluster, of v by program 1."""
    if step + AHEAD < job.tiles:
        key = call.key(job, step + AHEAD)
        head_kv = job.head // call.group
        if rank() == 0:
            fetch(job.batch, head_kv, key, call.D, DESCRIPTOR)
        if rank() == 1:
            fetch(job.batch, head_kv, key, call.D, DESCRIPTOR * 2)


@gluon.jit
def produce(call, shared, tensors):
    """Start all copies of all query tiles, as far ahead as there are empty slots."""
    if call.CLUSTER:
        sync_cluster()
    q, k, v = tensors[0], tensors[1], tensors[2]
    number = 0 * call.queries
    loaded = 0 * call.queries
    job = shared.jobs.receive(number, 1)
    while job.tiles > 0:
        shared.jobs.release(number)
        # the slot of these keys is empty before that of the queries
        load_keys(shared.k, shared.k_other, loaded, k, job, call.key(job, 0), call, 0)
        for who in gl.static_range(call.CONSUMERS):
            shared.q.load(number * call.CONSUMERS + who, q, job.batch, job.head, job.first_row + who * ROWS)
        load_keys(shared.v, shared.v_other, loaded, v, job, call.key(job, 0), call, 1)
        for step in range(1, job.tiles):
            key = call.key(job, step)
            load_keys(shared.k, shared.k_other, loaded + step, k, job, key, call, 0)
            load_keys(shared.v, shared.v_other, loaded + step, v, job, key, call, 1)
            if call.CLUSTER:
                fetch_ahead(call, job, step)
        loaded += job.tiles
        number += 1
        job = shared.jobs.receive(number, 1)
    if call.CLUSTER:
        sync_cluster()


# -- the consumers: a warpgroup each


@gluon.jit
def rows_of(job, call, WHO: gl.constexpr):
    """The bounds of rows WHO x 64 and on of a query tile, and the m and z from which they start."""
    S: gl.constexpr = product_layout(call.BLOCK_K)
    start = call.start + job.batch.to(gl.int64) * call.interval_stride_b
    end = call.end + job.batch.to(gl.int64) * call.interval_stride_b
    rows = job.first_row + WHO * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    valid = rows < call.queries
    row_start = gl.load(start + rows, valid, 0)
    row_end = gl.load(end + rows, valid, 0)
    m = gl.full([ROWS], NEG_INF, gl.float32, gl.SliceLayout(1, S))
    z = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
    if call.CARRY:
        lse = call.lse + job.batch.to(gl.int64) * call.lse_stride_b + job.head.to(gl.int64) * call.lse_stride_h
        m = gl.load(lse + rows, valid, NEG_INF) * LOG2_E_ - CARRIED_LOG2
        z = gl.where(m == NEG_INF, 0.0, CARRIED_Z)
    return row_start, row_end, m, z


@gluon.jit
def consume(call, shared, tensors, WHO: gl.constexpr):
    """A consumer: the 64 rows from WHO x 64 of every query tile of this program."""
    A: gl.constexpr = product_layout(call.D)
    if call.CLUSTER:
        sync_cluster()
    if WHO == call.CONSUMERS - 1:
        arrive(TURN, 256)
    tile = 0 * call.queries
    number = 0 * call.queries
    job = shared.jobs.receive(tile)
    row_start, row_end, m, z = rows_of(job, call, WHO)
    while job.tiles > 0:
        # 1. The first tile: scores only. The carried out arrives under them.
        acc = gl.zeros([ROWS, call.D], gl.float32, A)
        if call.CARRY:
            acc = load_carry(acc, job, job.first_row + WHO * ROWS, tensors, call)
        q_number = tile * call.CONSUMERS + WHO
        shared.q.wait_full(q_number)  # the copy engine
        shared.k.wait_full(number)  # the copy engine
        q = score_operands(shared.q.tile(q_number), call)
        begin_turn(WHO)
        scores = begin_scores(q, shared.k, number, call, WHO)
        end_turn(call, WHO)
        p, m, z, alpha = first_tile(scores, m, z, shared.k, shared.v, number, job, row_start, row_end, call)
        if call.CARRY:
            alpha *= CARRIED_Z

        # 2 and 3. The other tiles.
        acc, p, m, z, alpha = later_tiles(
            acc, p, m, z, alpha, q, shared.k, shared.v, number, job, row_start, row_end, call, WHO
        )

        # 4. The last tile's values. Under them, the next job's bounds and lse arrive.
        number += job.tiles
        shared.q.release(tile * call.CONSUMERS + WHO)
        output = begin_output(acc, p, alpha, shared.v, number - 1, call)
        following = shared.jobs.receive(tile + 1)
        row_start, row_end, m_next, z_next = rows_of(following, call, WHO)
        acc = warpgroup_mma_wait(0, deps=(output,))  # the tensor cores
        shared.v.release(number - 1)
        job = shared.jobs.read(tile)  # read again, so that the loops need not keep it in registers
        shared.jobs.release(tile)
        first_row = job.first_row + WHO * ROWS
        acc, total = divided(acc, m, z)
        rows = first_row + gl.arange(0, ROWS, layout=m.type.layout)
        lse = call.lse + job.batch.to(gl.int64) * call.lse_stride_b + job.head.to(gl.int64) * call.lse_stride_h
        gl.store(lse + rows, total, rows < call.queries)
        write(acc, job, first_row, tensors, call)

        m, z = m_next, z_next
        tile += 1
        job = shared.jobs.read(tile)
    if call.CLUSTER:
        sync_cluster()


# -- between registers and memory


@gluon.jit
def elements(x, stride_b, stride_s, stride_h, job, first_row, tile):
    """Pointers to the rows of x [B, S, H, D] from `first_row` that correspond to a tile.

    Strides are multiples of 16 bytes (`check_addresses`), so a thread accesses neighbouring columns at once.
    """
    A: gl.constexpr = tile.type.layout
    EVEN: gl.constexpr = 128 // tile.dtype.primitive_bitwidth
    rows = first_row + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, A))
    columns = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, A))
    x += gl.multiple_of(job.batch.to(gl.int64) * stride_b + job.head.to(gl.int64) * stride_h, EVEN)
    return x + gl.expand_dims(gl.multiple_of(rows.to(gl.int64) * stride_s, EVEN), 1) + gl.expand_dims(columns, 0)


@gluon.jit
def inside(first_row, tile, call):
    """Which elements of a tile of accumulators are rows of the sequence."""
    rows = first_row + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, tile.type.layout))
    return gl.broadcast(gl.expand_dims(rows < call.queries, 1), tile)[0]


@gluon.jit
def load_carry(acc, job, first_row, tensors, call):
    """The carried out of rows from `first_row` on, as accumulators like acc."""
    at = elements(
        tensors[3], call.carry_stride_b, call.carry_stride_s, call.carry_stride_h, job, first_row, acc
    )  # fmt: skip
    return gl.load(at, inside(first_row, acc, call), 0.0)


@gluon.jit
def write(acc, job, first_row, tensors, call):
    """Store the result of rows from `first_row` on."""
    out, final = tensors[4], tensors[5]
    if call.FINISHES:
        if job.into == OUT:
            store(acc, out, call.out_stride_b, call.out_stride_s, call.out_stride_h, job, first_row, call)
        elif job.into == FINAL:
            store(acc, final, call.final_stride_b, call.final_stride_s, call.final_stride_h, job, first_row, call)
    else:
        store(acc, out, call.out_stride_b, call.out_stride_s, call.out_stride_h, job, first_row, call)


@gluon.jit
def store(acc, out, stride_b, stride_s, stride_h, job, first_row, call):
    """Store acc as rows of out from `first_row` on."""
    acc = acc.to(out.dtype.element_ty)
    if acc.dtype.primitive_bitwidth == 16:
        acc = gl.convert_layout(acc, WIDE)
    at = elements(out, stride_b, stride_s, stride_h, job, first_row, acc)
    gl.store(at, acc, inside(first_row, acc, call))
