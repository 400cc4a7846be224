"""Parts of all Hopper backward kernels: a call's arguments, the tile of a program, and the reduction of gradients."""

# Annotations stay objects in this file (no `from __future__ import annotations`): Triton reads those of aggregates.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ringflash.kernels.gluon_names import add_out, aggregate, copy_out, reinterpret
from ringflash.kernels.hopper_parts import ROWS, mask_scores, softcap, tile_run


@aggregate
class KeyTile:
    """A program's keys, the query heads whose queries it processes, and the query tiles that see the keys.

    Of these tiles, `edges` are masked and the others are full.
    """

    batch: gl.tensor
    head: gl.tensor  # the first of `heads` query heads
    heads: gl.tensor
    head_kv: gl.tensor
    first_row: gl.tensor
    lo: gl.tensor
    tiles: gl.tensor
    edges: gl.tensor
    full_from: gl.tensor


@aggregate
class Call:
    """A call's pointers, scalars and constants."""

    lse: gl.tensor
    lse_stride_b: gl.tensor
    lse_stride_h: gl.tensor
    delta: gl.tensor
    delta_stride_b: gl.tensor
    delta_stride_h: gl.tensor
    start: gl.tensor  # query_start and query_end
    end: gl.tensor
    interval_stride_b: gl.tensor
    order: gl.tensor
    order_stride_b: gl.tensor
    center: gl.tensor  # if CENTERED
    center_stride_b: gl.tensor
    center_stride_h: gl.tensor
    tiles: gl.tensor  # KV tiles per head that programs process
    queries: gl.tensor
    keys: gl.tensor
    heads_kv: gl.tensor
    group: gl.tensor  # query heads of a KV head
    split: gl.tensor  # the number of programs among which these are divided
    batch_heads: gl.tensor  # batch rows x KV heads
    heads_in_l2: gl.tensor  # of these, processed at a time
    whole: gl.tensor  # programs before those with one query head each
    scale: gl.tensor
    c: gl.tensor
    cap_scale: gl.tensor
    lse_factor: gl.tensor  # -log2(e): lse is natural
    D: gl.constexpr
    BLOCK_Q: gl.constexpr
    KEYS: gl.constexpr  # per program: 128 or 64
    CAPPED: gl.constexpr
    CENTERED: gl.constexpr  # keys are k - center

    @gluon.jit
    def job(self):
        """This program's KV tile and the query tiles that see it, which are the same for each of its heads.

        Programs start in the order of their number, those with the most work first (`Order`), so that short ones fill
        the gaps at the end. `heads_in_l2` limits the number of KV heads whose queries and dq share L2 at a time.
        """
        PARTS: gl.constexpr = 2 * ROWS // self.KEYS  # of a tile of `order`
        index = gl.program_id(0)
        part = 0
        if PARTS > 1:
            part = index % PARTS
            index = index // PARTS
        if self.D > 64:
            over = gl.maximum(index - self.whole, 0)
            of_each = self.group // self.split
            heads = gl.where(index < self.whole, of_each, 1)
            member = over % of_each
            index = gl.minimum(index, self.whole) + over // of_each
        tiles_in_l2 = self.heads_in_l2 * self.split * self.tiles
        finished = index // tiles_in_l2 * self.heads_in_l2
        index = index % tiles_in_l2
        together = gl.minimum(self.heads_in_l2, self.batch_heads - finished)
        batch_head = finished + index % (together * self.split) // self.split
        if self.D > 64:
            head = of_each * (index % self.split) + member
        else:
            heads = self.group // self.split
            head = heads * (index % self.split)
        batch = batch_head // self.heads_kv
        head_kv = batch_head % self.heads_kv
        tile = gl.load(self.order + batch.to(gl.int64) * self.order_stride_b + index // (together * self.split))
        first = tile * (2 * ROWS) + part * self.KEYS
        last = gl.minimum(first + self.KEYS, self.keys) - 1
        start = self.start + batch.to(gl.int64) * self.interval_stride_b
        end = self.end + batch.to(gl.int64) * self.interval_stride_b
        first_key = first
        if PARTS > 1:
            first_key = gl.minimum(first, last)  # the last tile's second part may have no keys
        lo, count, full_from, full = tile_run(start, end, first_key, last, self.BLOCK_Q)
        # Keys past the end are zeros. Their score 0 may be far above lse, and 2^(0 - lse) = inf would make dq NaN.
        full = gl.where(first + self.KEYS > self.keys, 0, full)
        if PARTS > 1:
            count = gl.where(first < self.keys, count, 0)
        return KeyTile(batch, head_kv * self.group + head, heads, head_kv, first, lo, count, count - full, full_from)

    @gluon.jit
    def seen_by(self, job, keys):
        """query_start and query_end of keys, for `mask_scores`; 0 and 0 past the last key."""
        start = self.start + job.batch.to(gl.int64) * self.interval_stride_b
        end = self.end + job.batch.to(gl.int64) * self.interval_stride_b
        return gl.load(start + keys, keys < self.keys, 0), gl.load(end + keys, keys < self.keys, 0)

    @gluon.jit
    def row(self, job, step):
        """The first query of a step's tile: the full tiles come first, from the last one back, then the edges."""
        full = job.tiles - job.edges
        edge = gl.where(step - full < job.full_from, step - full, step)
        return job.lo + gl.where(step < full, job.full_from + full - 1 - step, edge) * self.BLOCK_Q


@gluon.jit
def make_full(SLOTS: gl.constexpr):
    """Barriers of tiles that are full once the copy engine has filled them and the producer has written their rows."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=2)
    return full


@gluon.jit
def make_rows(SLOTS: gl.constexpr, BLOCK_Q: gl.constexpr):
    """Shared memory for lse or delta of SLOTS query tiles."""
    return gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def weights(s, lse, call, row, key_start, key_end, EDGE: gl.constexpr):
    """p of a tile of scores, and the softcap's derivative, by which ds is multiplied.

    The FMA that multiplies by c also adds lse. In the accumulators, lse would be needed before the product starts.
    """
    slope = 1.0
    if call.CAPPED:
        s = softcap(s, call.cap_scale)
        slope = 1.0 - s * s
    p = gl.exp2(s * call.c + lse)
    if EDGE:
        p = mask_scores(p, key_start, key_end, row, "0f00000000")
    return p, slope


@gluon.constexpr_function
def permuted(rows, columns):
    """A [rows, columns] fp32 tile in the copy engine's 128-byte swizzle, with columns 0 2 4 6 1 3 5 7 of every 8.

    The four threads of a row hold columns 0, 2, 4 and 6 in one register and 1, 3, 5 and 7 in another.
    """
    bases = [[0, 2], [0, 4], [0, 1], [0, 8], [0, 16]]
    row = 1
    while row < rows:
        column = 4 * row % 32
        bases.append([row, 1 if column == 4 else column])
        row *= 2
    if columns == 64:
        bases.append([0, 32])
    return gl.SharedLinearLayout(bases, alignment=1024)


@gluon.jit
def center_keys(keys, job, call):
    """Subtract the center from a tile of keys in shared memory, as `portable_compensation.subtract` does in memory."""
    ACROSS: gl.constexpr = keys.shape[1] // 8  # threads that share a row, 16 bytes each
    DOWN: gl.constexpr = 32 // ACROSS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [DOWN, ACROSS], [4, 1], [1, 0])
    columns = gl.arange(0, keys.shape[1], layout=gl.SliceLayout(0, layout))
    place = job.batch.to(gl.int64) * call.center_stride_b + job.head_kv * call.center_stride_h
    center = gl.load(call.center + place + columns).to(gl.float32)
    tile = keys.load(layout).to(gl.float32) - gl.expand_dims(center, 0)
    keys.store(tile.to(keys.dtype))


@gluon.jit
def stage_dq(dq_tile, staged):
    """Write columns of dq to shared memory `staged`, from which the copy engine adds them to dq.

    In this order of columns, stmatrix stores the product's registers as they are, without bank conflicts.
    """
    layout: gl.constexpr = permuted(dq_tile.shape[0], dq_tile.shape[1])
    tile = reinterpret(staged, gl.float32, [dq_tile.shape[0], dq_tile.shape[1]], layout)
    tile.store(dq_tile)


@gluon.jit
def store_gradient(tile, staged, gradient, place):
    """Add a tile of dk or dv to fp32 memory, or write it in 16 bits, through shared memory `staged`.

    The copy engine clips rows past the end.
    """
    staged.store(tile.to(gradient.dtype))
    fence_async_shared()  # makes the threads' writes visible to the copy engine
    if gradient.dtype == gl.float32:
        add_out(gradient, place, staged)
    else:
        copy_out(gradient, place, staged)
