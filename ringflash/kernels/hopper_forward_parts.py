"""What the Hopper forward has in common at all head sizes, in Gluon: jobs, a step of a consumer, the division by z.

`hopper_forward` explains the mathematics and the order of steps.
"""

# Annotations stay objects in this file (no `from __future__ import annotations`): Triton reads those of aggregates.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from ringflash.kernels.gluon_names import aggregate
from ringflash.kernels.hopper_cluster import rank, wait_at
from ringflash.kernels.hopper_parts import FIRST_BARRIER, NEG_INF, ROWS, Job, arrive, product_layout, sync, tile_run
from ringflash.kernels.hopper_softmax import guess_step, packed, scale_rows, softmax_step, to_rows, to_threads, unpacked
from ringflash.kernels.portable_parts import LOG2_E

LOG2_E_ = gl.constexpr(LOG2_E)
LN_2 = gl.constexpr(0.6931471805599453)
HELD = gl.constexpr(128)  # columns of q in registers at head_dim 256: 32 registers per thread
STAGES = gl.constexpr(2)  # K tiles, and V tiles, in shared memory
# For PTX at head_dim 256. In bytes of shared memory: tiles of k, which come after q and before v; `full` of k and then
# of v, `k_other` and then `v_other`, BARRIERS each. Triton sorts by size, and with BARRIERS these come before what it
# needs to store out. In PTX, k is parameter DESCRIPTOR, and v twice that.
K_AT, FULL_AT, OTHER_AT = gl.constexpr(64 << 10), gl.constexpr(192 << 10), gl.constexpr(200 << 10)
BARRIERS, DESCRIPTOR = gl.constexpr(4096), gl.constexpr(9)
# What the two programs of a cluster work on: neighbouring heads of a group, or neighbouring query tiles of a head.
OF_HEADS, OF_QUERIES = gl.constexpr(1), gl.constexpr(2)
# Where the result of a tile is written. NOWHERE: an earlier call completed it, and the carry does not have it.
OUT, FINAL, NOWHERE = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
# Named barriers. TURN has one per consumer, which it shares with the consumer before it.
TURN = gl.constexpr(FIRST_BARRIER)
K_EMPTY = gl.constexpr(FIRST_BARRIER + 3)
V_EMPTY = gl.constexpr(FIRST_BARRIER + 3 + STAGES.value)


@aggregate
class Call:
    """A call's pointers, scalars and constants."""

    lse: gl.tensor
    lse_stride_b: gl.tensor
    lse_stride_h: gl.tensor
    carry_stride_b: gl.tensor  # these nine at head_dim 256
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
    batch_heads: gl.tensor  # batch rows x KV heads
    heads_in_l2: gl.tensor  # of these, processed at a time
    c: gl.tensor
    cap_scale: gl.tensor
    D: gl.constexpr
    BLOCK_K: gl.constexpr
    CONSUMERS: gl.constexpr
    CAPPED: gl.constexpr
    CARRY: gl.constexpr
    GUESS: gl.constexpr  # consumers work in sequence, with `guess_step` in full tiles and p in `packed` form
    CLUSTER: gl.constexpr  # two programs share k and v: OF_HEADS, OF_QUERIES, or 0 for single programs
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
        """Query tiles of all heads; with OF_QUERIES, two are one."""
        return self.batch_heads * self.group * self.tiles

    @gluon.jit
    def job(self, index):
        """Query tile number `index` and its KV tiles: at least one, or none past the last query tile.

        Tiles that see the most keys come first (`Order`). Within a tile, the index runs over heads, group by group, so
        that all SMs read the same tiles of K and V from L2. `heads_in_l2` limits the number of KV heads at a time.
        """
        PROGRAM: gl.constexpr = self.CONSUMERS * ROWS
        TILE: gl.constexpr = PROGRAM * (2 if self.CLUSTER == OF_QUERIES else 1)
        total = self.total()
        taken = index < total
        index = gl.minimum(index, total - 1)

        tiles_in_l2 = self.heads_in_l2 * self.group * self.tiles
        finished = index // tiles_in_l2 * self.heads_in_l2
        index = index % tiles_in_l2
        heads = gl.minimum(self.heads_in_l2, self.batch_heads - finished) * self.group
        batch_head = finished + index % heads // self.group
        batch = batch_head // self.heads_kv
        head_kv = batch_head % self.heads_kv
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
        if self.CLUSTER == OF_QUERIES:
            first += rank() * PROGRAM
        return Job(batch, head, head_kv, first, lo, tiles, tiles - full, full_from, into)


# -- a consumer's steps


@gluon.jit
def score_operands(q_tile, call):
    """The left operands of the scores: a consumer's queries in shared memory; at head_dim 256, half in registers."""
    Q: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product_layout(call.BLOCK_K), k_width=2)
    return (q_tile.slice(0, HELD, 1).load(Q), q_tile.slice(HELD, HELD, 1)) if call.D == 256 else (q_tile,)


@gluon.jit
def begin_turn(WHO: gl.constexpr):
    """Wait until the consumer before this one has ended its turn."""
    sync(TURN + WHO, 256, 4)


@gluon.jit
def end_turn(call, WHO: gl.constexpr):
    """Let the next consumer begin its turn."""
    arrive(TURN + (WHO + 1) % call.CONSUMERS, 256)


@gluon.jit
def begin_scores(q, k_pipe, number, call, WHO: gl.constexpr):
    """Start the scores of KV tile `number`, when it is this consumer's turn. Returns a product in flight.

    At head_dim 256, the caller waits for the turn and passes it.
    """
    S: gl.constexpr = product_layout(call.BLOCK_K)
    zeros = gl.zeros([ROWS, call.BLOCK_K], gl.float32, S)
    if call.D != 256:
        begin_turn(WHO)
    k = k_pipe.tile(number).permute((1, 0))
    if call.D == 256:
        scores = warpgroup_mma(q[0], k.slice(0, HELD, 0), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma(q[1], k.slice(HELD, HELD, 0), scores, is_async=True)
    else:
        scores = warpgroup_mma(q[0], k, zeros, use_acc=False, is_async=True)
    if call.D != 256:
        end_turn(call, WHO)
    return scores


@gluon.jit
def begin_output(acc, p, alpha, v_pipe, number, call):
    """Start acc = a acc + p v for KV tile `number`, with p in registers. Returns a product in flight."""
    dtype: gl.constexpr = v_pipe.tiles.dtype
    weights = unpacked(p, dtype) if call.GUESS else p.to(dtype)
    acc = scale_rows(acc, alpha)
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    weights = gl.convert_layout(weights, A)
    if call.D == 256:
        wait_at(FULL_AT + BARRIERS + (number & 1) * 8, (number >> 1) & 1, 1 + 0 * number)  # the copy engine
    else:
        v_pipe.wait_full(number)  # the copy engine
    return warpgroup_mma(weights, v_pipe.tile(number), acc, is_async=True)


@gluon.jit
def wait_for_keys(k_pipe, number, more, call):
    """Wait until the copy engine has copied KV tile `number`, if there are more."""
    if call.D == 256:
        wait_at(FULL_AT + (number & 1) * 8, (number >> 1) & 1, more.to(gl.int32))
    else:
        k_pipe.wait_full(number, more)


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
        if call.D == 256:
            begin_turn(WHO)
        output = begin_output(acc, p, alpha, v_pipe, number - 1, call)
        scores = begin_scores(q, k_pipe, number, call, WHO)
        # The tensor cores, for the older of two products. At 256, scores are two, and their first half is done too.
        acc = warpgroup_mma_wait(1, deps=(output,))
        if call.D == 256:
            end_turn(call, WHO)
        v_pipe.release(number - 1)
        s = warpgroup_mma_wait(0, deps=(scores,))  # the tensor cores
        k_pipe.release(number)
        if EDGE:
            p, m, z, alpha = softmax_step(s, m, z, key, row_start, row_end, call, EDGE)
            wait_for_keys(k_pipe, number + 1, more, call)
            p = packed(p, dtype)
        else:
            p, m, z, alpha = guess_step(s, m, z, call, dtype)
            wait_for_keys(k_pipe, number + 1, more, call)
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
def first_tile(scores, m, z, k_pipe, v_pipe, number, job, row_start, row_end, call):
    """Weights of a query tile's first KV tile, which is `number` and masked, from scores in flight."""
    s = warpgroup_mma_wait(0, deps=(scores,))  # the tensor cores
    k_pipe.release(number)
    p, m, z, alpha = softmax_step(s, m, z, call.key(job, 0), row_start, row_end, call, EDGE=True)
    k_pipe.wait_full(number + 1, job.tiles > 1)  # the copy engine
    if call.GUESS:
        p = packed(p, v_pipe.tiles.dtype)
    return p, m, z, alpha


@gluon.jit
def later_tiles(acc, p, m, z, alpha, q, k_pipe, v_pipe, number, job, row_start, row_end, call, WHO: gl.constexpr):
    """The steps after the first tile, which is `number`: weights of the last tile, and acc of all tiles before it."""
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
    return acc, p, m, z, alpha


@gluon.jit
def divided(acc, m, z):
    """out and lse of rows whose softmax state is (m, z, acc)."""
    seen = z > 0
    z = gl.where(seen, z, 1.0)  # a row that has seen nothing: acc is 0 already
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / z, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc, gl.where(seen, (m + gl.log2(z)) * LN_2, NEG_INF)
