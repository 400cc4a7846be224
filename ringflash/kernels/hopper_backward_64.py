"""Consumers of `hopper_backward` at head_dim 64, in Gluon. They divide the keys, as in `hopper_backward_128`.

A step has 128 queries, so waits, barriers and fences count half as much. The scores are one product. From the
exponentials on, a step proceeds by halves of 64 queries, and one half's products run under the other's exponentials.
dq, one step late, is divided by these halves as well.

The pipeline of a consumer's step 2. ds1 is both consumers' ds of the previous step; ' and " are the halves:

    copy engine                                                                                   dq1 +=
    tensor cores    s2 = k q2^T . dp2 = v dout2^T | dv += p2' dout' | dk += ds2' q' . dq1 = ds1 k | dv, dk of p2", ds2"
    consumer                      p2' = 2^(c s2)  | ds2'            | p2"           . ds2"        | dq1, ds2 written
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

from ringflash.kernels.gluon_names import add_out, aggregate, reinterpret
from ringflash.kernels.hopper_backward_128 import (
    EMPTY,
    PUBLISHED,
    announce,
    finish,
    store_gradients,
    walk_queries,
)
from ringflash.kernels.hopper_backward_parts import center_keys, make_full, make_rows, weights
from ringflash.kernels.hopper_parts import (
    ROWS,
    Pipe,
    arrive,
    make_pipe,
    make_tiles,
    opaque_zero,
    product_layout,
    sync,
)


@aggregate
class Shared:
    """All shared memory. Tiles 0 and 1 of kv are k and v of both consumers, filled once.

    Stages work as in `hopper_backward_128`.
    """

    kv: Pipe
    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor  # -log2(e) lse, -inf where a row sees nothing
    delta: gl.shared_memory_descriptor  # -delta
    full: gl.shared_memory_descriptor
    ds0: gl.shared_memory_descriptor  # two steps of both consumers' keys, queries 0..63: [keys, queries]
    ds1: gl.shared_memory_descriptor  # queries 64..127
    dq: gl.shared_memory_descriptor  # one tile per consumer: half of the queries
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
        make_tiles(dtype, 2, 2 * ROWS, ROWS),
        make_tiles(dtype, 2, 2 * ROWS, ROWS),
        make_tiles(gl.float32, 2, ROWS, D),
        STAGES,
    )


# -- the consumers: a warpgroup each


@gluon.constexpr_function
def swapped(rows, columns):
    """A [rows, columns] fp32 tile in the copy engine's 128-byte swizzle, columns 0..15 and 16..31 swapped in odd rows.

    The bits of the offset are 32 columns, the rows, the next 32 columns. The swizzle moves a row's pieces of 16 bytes:
    piece i of row r is at i ^ (r % 8).
    """
    bases = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]]
    row = 1
    while row < rows:
        bases.append([row, 4 * row % 32 ^ (16 if row == 1 else 0)])
        row *= 2
    if columns == 64:
        bases.append([0, 32])
    return gl.SharedLinearLayout(bases, alignment=1024)


@gluon.jit
def stage(dq_tile, shared, call, WHO: gl.constexpr):
    """Write columns of dq, times scale, to shared memory, from which the copy engine adds them to dq.

    Half a warp writes 32 bytes of each of four rows at a time. Under the swizzle, rows 0 and 1 would use the same
    banks, as would rows 2 and 3. So odd rows write columns that are 16 apart from those of even rows: a thread's values
    are swapped in registers, and the layout swaps their destinations.
    """
    staged = shared.dq.index(WHO)
    ROWS_: gl.constexpr = dq_tile.shape[0]
    COLUMNS: gl.constexpr = dq_tile.shape[1]
    low, high = (dq_tile * call.scale).reshape([ROWS_, COLUMNS // 32, 2, 16]).permute((0, 1, 3, 2)).split()
    rows = gl.arange(0, ROWS_, layout=gl.SliceLayout(1, gl.SliceLayout(2, low.type.layout)))
    odd = gl.expand_dims(gl.expand_dims(rows, 1), 2) % 2 == 1
    both = gl.join(gl.where(odd, high, low), gl.where(odd, low, high)).permute((0, 1, 3, 2))
    layout: gl.constexpr = swapped(ROWS_, COLUMNS)
    tile = reinterpret(staged, gl.float32, [ROWS_, COLUMNS], layout)
    tile.store(both.reshape([ROWS_, COLUMNS]))


@gluon.jit
def load_row(rows, HALF: gl.constexpr):
    """lse or delta of half of the queries, the columns of the scores: [1, 64]."""
    layout: gl.constexpr = gl.SliceLayout(0, product_layout(ROWS))
    return gl.expand_dims(rows.slice(HALF * ROWS, ROWS, 0).load(layout), 0)


@gluon.jit
def half(x, HALF: gl.constexpr):
    """Half of the queries, which are columns of a product [64, 128], in their own registers: nothing moves."""
    low, high = x.reshape([ROWS, 2, ROWS]).permute((0, 2, 1)).split()
    return gl.convert_layout(low if HALF == 0 else high, product_layout(ROWS), assert_trivial=True)


@gluon.jit
def begin_dq(shared, number, call, WHO: gl.constexpr):
    """Start the previous step's dq of this consumer's queries, over all keys. Returns a product in flight."""
    zeros = gl.zeros([ROWS, call.D], gl.float32, product_layout(call.D))
    sync(PUBLISHED + 2 * (1 - WHO) + number % 2, 256, 4)  # the other consumer
    tiles = shared.ds0 if WHO == 0 else shared.ds1
    ds = tiles.index(number % 2).permute((1, 0))
    keys = shared.kv.tiles.index(opaque_zero(number))
    return warpgroup_mma(ds, keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def publish(ds0, ds1, shared, number, WHO: gl.constexpr):
    """Write this consumer's ds to shared memory, for dq of both consumers, who read it after a fence and `announce`.

    The slot is empty: its last reader was the other consumer's dq of two steps ago. That was done before the other
    published the ds for which this consumer has waited since.
    """
    shared.ds0.index(number % 2).slice(WHO * ROWS, ROWS, 0).store(ds0)
    shared.ds1.index(number % 2).slice(WHO * ROWS, ROWS, 0).store(ds1)


@gluon.jit
def step(
    dk, dv, dq_head, dq_row, shared, number, more, batch, head, row, key_start, key_end, dq, call,
    WHO: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Scores, dk and dv of query tile `number` with this consumer's keys, and dq of the previous tile.

    more: whether another tile follows.
    """
    S: gl.constexpr = product_layout(call.BLOCK_Q)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dk.type.layout, k_width=2)
    slot = number % shared.DEPTH
    q_tile = shared.q.index(slot)
    q0, q1 = q_tile.slice(0, ROWS, 0), q_tile.slice(ROWS, ROWS, 0)
    dout_tile = shared.dout.index(slot)
    dout0, dout1 = dout_tile.slice(0, ROWS, 0), dout_tile.slice(ROWS, ROWS, 0)
    lse = shared.lse.index(slot)
    delta = shared.delta.index(slot)
    zeros = gl.zeros([ROWS, call.BLOCK_Q], gl.float32, S)

    lse0 = load_row(lse, 0)
    keys = shared.kv.tiles.index(opaque_zero(number)).slice(WHO * ROWS, ROWS, 0)
    values = shared.kv.tiles.index(1 + opaque_zero(number)).slice(WHO * ROWS, ROWS, 0)
    scores = warpgroup_mma(keys, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dscores = warpgroup_mma(values, dout_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)

    # 1. The first half.
    s = warpgroup_mma_wait(1, deps=(scores,))  # the tensor cores, for the older of two products
    p0, slope0 = weights(half(s, 0), lse0, call, row, key_start, key_end, EDGE)
    sloped0 = p0 * slope0
    dv_half = warpgroup_mma(gl.convert_layout(p0.to(q_tile.dtype), LEFT), dout0, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dscores,))  # the tensor cores, for all but dv
    ds0 = (sloped0 * (half(dp, 0) + load_row(delta, 0))).to(q_tile.dtype)
    dk_half = warpgroup_mma(gl.convert_layout(ds0, LEFT), q0, dk, is_async=True)
    tma.store_wait(0)  # the copy engine, which reads dq of the previous step from the same shared memory
    dq_next = begin_dq(shared, number, call, WHO)

    # 2. The second half, under dk and dq of the first.
    p1, slope1 = weights(half(s, 1), load_row(lse, 1), call, row + ROWS, key_start, key_end, EDGE)
    sloped1 = p1 * slope1
    dv_next = warpgroup_mma(gl.convert_layout(p1.to(q_tile.dtype), LEFT), dout1, dv_half, is_async=True)
    ds1 = (sloped1 * (half(dp, 1) + load_row(delta, 1))).to(q_tile.dtype)
    dk_next = warpgroup_mma(gl.convert_layout(ds1, LEFT), q1, dk_half, is_async=True)

    # 3. ds and dq are stored.
    publish(ds0, ds1, shared, number + 1, WHO)
    dq_half = warpgroup_mma_wait(1, deps=(dq_next,))  # the tensor cores, for all but dk
    stage(dq_half, shared, call, WHO)
    fence_async_shared()  # makes the threads' writes visible to tensor cores and copy engine
    announce(number + 1, WHO)
    add_out(dq, [batch, dq_head, dq_row + WHO * ROWS, 0], shared.dq.index(WHO))
    shared.wait_full(number + 1, more)  # the copy engine and the producer
    dk, dv = warpgroup_mma_wait(0, deps=(dk_next, dv_next))  # the tensor cores
    arrive(EMPTY + slot, 288)
    return dk, dv, head, row


@gluon.jit
def consume(call, shared, descriptors, WHO: gl.constexpr):
    """A consumer: the 64 keys from WHO x 64 of this program's KV tile."""
    dq = descriptors[4]
    A: gl.constexpr = product_layout(call.D)
    S: gl.constexpr = product_layout(ROWS)
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
        nothing = gl.zeros([ROWS, ROWS], descriptors[0].dtype, S)
        publish(nothing, nothing, shared, 0, WHO)
        fence_async_shared()
        announce(0, WHO)
        tma.store_wait(0)  # waits for nothing, but brings the warpgroup's barrier that Triton would put into the loop
        shared.kv.wait_full(1)  # the copy engine
        shared.wait_full(0)
        dk_acc, dv_acc, number, dq_head, dq_row = walk_queries(
            step, dk_acc, dv_acc, shared, job, key_start, key_end, dq, call, WHO
        )
        # dq of the last query tile, then dk and dv.
        dq_next = begin_dq(shared, number, call, WHO)
        place = [job.batch, dq_head, dq_row + WHO * ROWS, 0]
        finish(stage, dq_next, dk_acc, dv_acc, place, row, job, shared, descriptors, call, WHO)
    elif descriptors[5].dtype != gl.float32:  # no query sees these keys
        unseen = gl.zeros([ROWS, call.D], gl.float32, A)
        store_gradients(unseen, unseen, job.first_row + WHO * ROWS, job, shared, descriptors, call, WHO)
