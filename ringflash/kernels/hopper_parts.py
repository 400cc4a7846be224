"""Parts of both Hopper kernels: barriers, pipes between warps, jobs of programs, TMA descriptors, and input checks.

The kernels are in `hopper_forward` and `hopper_backward`.
"""

# Annotations stay objects in this file (no `from __future__ import annotations`): Triton reads those of aggregates.
import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringflash.intervals import Intervals
from ringflash.kernels import checks
from ringflash.kernels.checks import address_refusal, check_alike, check_intervals, request_refusal, stride_refusal
from ringflash.kernels.gluon_names import TESTED, aggregate, copy_in, triton_version
from ringflash.kernels.portable_parts import LOG2_E, arch

ROWS = gl.constexpr(64)  # of a consumer's tile: those of one wgmma
NEG_INF = gl.constexpr(float("-inf"))
# tanh x is x + a x^3 + b x^5 up to x = 1/4, with a relative error of at most 1e-6; here as a series in y = 2 log2(e) x
SMALL = gl.constexpr(0.25 * 2 * LOG2_E)
SERIES_1, SERIES_3, SERIES_5 = (
    gl.constexpr(coefficient / (2 * LOG2_E) ** power)
    for power, coefficient in ((1, 1.0), (3, -0.33326131), (5, 0.12914957))
)
FIRST_BARRIER = 8  # of the 16 named barriers. Triton uses those from 0: one per partition, and two of its own
L2_BYTES = 32 << 20  # of 50 MB, for data that is read repeatedly; the rest is for data that streams through
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
HEAD_DIMS = (64, 128, 256)
COUNTER_SIZE = 512  # the counter, and two slots for each of up to 255 clusters


@dataclass(frozen=True)
class Registers:
    """Registers per thread: at launch an equal share of an SM's 65536, then those that setmaxnreg assigns."""

    launch: int
    consumer: int
    producer: int  # one warp, padded to a warpgroup


REGISTERS = {2: Registers(168, 240, 24), 3: Registers(128, 160, 32)}  # by the number of consumers


# -- named barriers: a warp arrives and continues, whereas an mbarrier synchronises its whole warpgroup


@gluon.constexpr_function
def barrier_asm(verb, threads):
    """PTX for one thread."""
    return f"bar.{verb} $1, {threads}; mov.u32 $0, $1;"


@gluon.jit
def sync(barrier, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """Wait, with all WARPS of this partition, until THREADS threads have arrived. Each thread has one element."""
    thread = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    asm: gl.constexpr = barrier_asm("sync", THREADS)
    gl.inline_asm_elementwise(asm, "=r,r", [thread * 0 + barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def arrive(barrier, THREADS: gl.constexpr):
    """Arrive at the barrier with the four warps of this partition, without waiting."""
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    asm: gl.constexpr = barrier_asm("arrive", THREADS)
    gl.inline_asm_elementwise(asm, "=r,r", [thread * 0 + barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def product_layout(columns):
    """The register layout of a wgmma's result [64, columns] in a warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


# -- shared memory between warps


@gluon.jit
def opaque_zero(number):
    """0, computed from a step's number below 2^30 in a way that the compiler cannot see through.

    An address to which this is added is computed in every step, in two or three instructions. Otherwise the compiler
    keeps the constant addresses of all operands in registers throughout the loop, and spills them.
    """
    return number >> 30


@aggregate
class Pipe:
    """A circular buffer of DEPTH tiles in shared memory. Tiles are numbered from 0; number n is in slot n % DEPTH.

    The copy engine signals full[slot] when all bytes have arrived. A single reader, a warpgroup, releases a slot
    through the mbarrier empty[slot]. Several READERS release it through the named barrier EMPTY + slot, where their
    warps arrive one by one. BITS: two slots, whose numbers are bits of the tile's, which saves instructions.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    DEPTH: gl.constexpr
    READERS: gl.constexpr
    EMPTY: gl.constexpr
    BITS: gl.constexpr

    @gluon.jit
    def slot(self, number):
        """The slot of tile `number`."""
        return number & (self.DEPTH - 1) if self.BITS else number % self.DEPTH

    @gluon.jit
    def phase(self, number):
        """0 or 1: the parity of the times that the slot of tile `number` was used before."""
        return (number >> 1) & 1 if self.BITS else number // self.DEPTH & 1

    @gluon.jit
    def tile(self, number):
        """The shared memory of tile `number`."""
        return self.tiles.index(self.slot(number))

    @gluon.jit
    def wait_full(self, number, pred=True):
        """Wait until the copy engine has filled a tile."""
        mbarrier.wait(self.full.index(self.slot(number)), self.phase(number), pred=pred)

    @gluon.jit
    def wait_empty(self, number):
        """Wait until the readers have released the slot's previous tile. For the producer, one warp."""
        if self.READERS == 1:
            mbarrier.wait(self.empty.index(self.slot(number)), (self.phase(number)) ^ 1)
        elif number >= self.DEPTH:
            sync(self.EMPTY + self.slot(number), 32 + 128 * self.READERS, 1)

    @gluon.jit
    def release(self, number):
        """Release a tile that this warpgroup has read."""
        if self.READERS == 1:
            mbarrier.arrive(self.empty.index(self.slot(number)), count=1)
        else:
            arrive(self.EMPTY + self.slot(number), 32 + 128 * self.READERS)

    @gluon.jit
    def load(self, number, descriptor, batch, head, row):
        """Start the copy of a tile from row `row` of a [B, H, S, D] tensor, once its slot is empty."""
        self.wait_empty(number)
        self.copy(number, descriptor, batch, head, row)

    @gluon.jit
    def copy(self, number, descriptor, batch, head, row):
        """Start the copy of a tile whose slot is empty."""
        full = self.full.index(self.slot(number))
        mbarrier.expect(full, descriptor.block_type.nbytes)
        copy_in(descriptor, [batch, head, row, 0], full, self.tiles.index(self.slot(number)))


@gluon.jit
def make_tiles(dtype: gl.constexpr, COUNT: gl.constexpr, BLOCK: gl.constexpr, COLUMNS: gl.constexpr):
    """Shared memory for COUNT tiles [BLOCK, COLUMNS], in the layout of wgmma and the copy engine."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, COLUMNS], dtype)
    return gl.allocate_shared_memory(dtype, [COUNT, BLOCK, COLUMNS], layout)


@gluon.jit
def make_pipe(
    dtype: gl.constexpr, DEPTH: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr,
    READERS: gl.constexpr = 1, EMPTY: gl.constexpr = 0, WRITERS: gl.constexpr = 1, BITS: gl.constexpr = False,
):  # fmt: skip
    """A Pipe of [BLOCK, D] tiles. READERS: 0 for memory without barriers.

    EMPTY: the first of DEPTH named barriers, for several readers. WRITERS: 2 if the producer also arrives at
    full[slot]. An mbarrier is only made if warps wait at it. Triton reuses the memory of one that is only initialised,
    and in PTX the contents of that memory are undefined.
    """
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = make_tiles(dtype, DEPTH, BLOCK, D)
    full, empty = tiles, tiles  # placeholders, never used as barriers
    if READERS > 0:
        full = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], barrier_layout)
    if READERS == 1:
        empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], barrier_layout)
    for slot in gl.static_range(DEPTH):
        if READERS > 0:
            mbarrier.init(full.index(slot), count=WRITERS)
        if READERS == 1:
            mbarrier.init(empty.index(slot), count=1)
    return Pipe(tiles, full, empty, DEPTH, READERS, EMPTY, BITS)


# -- the tiles of a program


@aggregate
class Job:
    """A tile of rows and the tiles of columns that they see: `edges` masked ones and the full ones.

    Rows and columns are queries and keys in the forward, and keys and queries in the backward.
    """

    batch: gl.tensor
    head: gl.tensor
    head_kv: gl.tensor
    first_row: gl.tensor
    lo: gl.tensor
    tiles: gl.tensor
    edges: gl.tensor
    full_from: gl.tensor
    into: gl.tensor  # in the forward, where the tile's result is written: OUT, FINAL or NOWHERE

    @gluon.jit
    def fields(self):
        """The job as a vector of 8, for `receive_job`: all but the KV head, which is head // group."""
        i = gl.arange(0, 8, layout=gl.BlockedLayout([1], [32], [1], [0]))
        heads = gl.where(i == 1, self.head, gl.where(i == 2, self.into, self.first_row))
        where = gl.where(i == 0, self.batch, heads)
        what = gl.where(i == 4, self.lo, gl.where(i == 5, self.tiles, gl.where(i == 6, self.edges, self.full_from)))
        return gl.where(i < 4, where, what)


@gluon.jit
def receive_job(fields, WARPS: gl.constexpr = 4):
    """The job with these 8 fields, which are in shared memory. For a partition of WARPS."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])  # each thread reads all of them
    i = gl.arange(0, 8, layout=layout)
    x = fields.load(layout)
    head = gl.sum(gl.where(i == 1, x, 0), 0)
    return Job(
        gl.sum(gl.where(i == 0, x, 0), 0), head, head, gl.sum(gl.where(i == 3, x, 0), 0),
        gl.sum(gl.where(i == 4, x, 0), 0), gl.sum(gl.where(i == 5, x, 0), 0), gl.sum(gl.where(i == 6, x, 0), 0),
        gl.sum(gl.where(i == 7, x, 0), 0), gl.sum(gl.where(i == 2, x, 0), 0),
    )  # fmt: skip


@gluon.jit
def next_tile(counter, total):
    """The next tile number from a shared counter; a program's first tile is its own number. For a warp.

    A program that starts late, because another kernel held its SM, takes fewer tiles. Every tile is followed by one
    call, so `total` calls are made, and the last one resets the counter to 0.
    """
    thread = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    taken = gl.atomic_add(counter + thread, thread * 0 + 1, mask=thread == 0, sem="relaxed")
    taken = gl.sum(gl.where(thread == 0, taken, 0), 0)
    gl.store(counter + thread, thread * 0, mask=(thread == 0) & (taken == total - 1))
    return gl.num_programs(0) + taken


@gluon.jit
def tile_run(start, end, first, last, BLOCK: gl.constexpr):
    """The tiles that rows first..last see: first key, number of tiles, first full tile, number of full tiles."""
    lo = gl.load(start + first)
    hi = gl.load(end + last)
    all_from = gl.load(start + last)
    all_to = gl.load(end + first)
    tiles = gl.cdiv(hi - lo, BLOCK)
    full_from = gl.minimum(gl.cdiv(all_from - lo, BLOCK), tiles)
    return lo, tiles, full_from, gl.maximum((all_to - lo) // BLOCK, full_from) - full_from


# -- scores


@gluon.constexpr_function
def mask_scores_asm(count, value):
    """PTX: set registers $0.. of a thread's two rows to `value` if the row does not see their column.

    A thread has columns 2 (lane % 4) + 8 k and the next one, first of its first row and then of its second, for k = 0,
    1, ... The operands after the tile's are start - first_column, then end - start, `count` each. Each column takes one
    unsigned comparison, which wraps below start.
    """
    before = f"""
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 3;
        shl.b32 lane, lane, 1;
        sub.s32 from0, lane, ${2 * count};
        sub.s32 from1, lane, ${2 * count + 2};
    """
    lines = []
    for i in range(count):
        row, column = i % 4 // 2, 8 * (i // 4) + i % 2
        lines.append(f"add.s32 at, from{row}, {column};")
        lines.append(f"setp.ge.u32 unseen, at, ${3 * count + 2 * row};")
        lines.append(f"selp.f32 ${i}, {value}, ${i}, unseen;")
    return "{.reg .pred unseen; .reg .b32 lane, at, from0, from1;" + before + " ".join(lines) + "}"


@gluon.constexpr_function
def mask_scores_operands(count):
    """`count` results, initialised from the first `count` operands, and twice as many other operands."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * 2 * count)


@gluon.jit
def mask_scores(s, start, end, first_column, value: gl.constexpr):
    """s [rows, columns], a wgmma's result, with `value` (PTX) where column `first_column` + j is not in start:end.

    This is PTX because Triton would compute each thread's columns again from the bits of its number: 237 instructions
    instead of 112 in a step of the backward.
    """
    COUNT: gl.constexpr = s.shape[1] // 2  # registers of a thread: 64 rows over 128 threads
    begin = gl.broadcast(gl.expand_dims(start - first_column, 1), s)[0]
    size = gl.broadcast(gl.expand_dims(end - start, 1), s)[0]
    return gl.inline_asm_elementwise(
        mask_scores_asm(COUNT, value), mask_scores_operands(COUNT), [s, begin, size], dtype=gl.float32, is_pure=True,
        pack=COUNT,
    )  # fmt: skip


@gluon.jit
def softcap(s, cap_scale):
    """tanh(s scale / softcap), with cap_scale = 2 log2(e) scale / softcap and a relative error of a few 1e-6.

    This is 1 - 2 / (1 + 2^y), and a polynomial for small y, where that cancels. See `portable_parts.softcap`.
    """
    y = s * cap_scale
    reciprocal = gl.inline_asm_elementwise(  # one instruction, where Triton's division takes several
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + gl.exp2(y)], dtype=gl.float32, is_pure=True, pack=1
    )
    square = y * y
    small = y * ((SERIES_5 * square + SERIES_3) * square + SERIES_1)
    return gl.where(gl.abs(y) < SMALL, small, 1.0 - 2.0 * reciprocal)


# -- launch


def tiles(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """A TMA descriptor of x [B, S, H, D] as [B, H, S, D], in tiles of rows x columns (by default all of D)."""
    B, S, H, D = x.shape
    # A dimension of size 1 may have any stride, but the copy engine still requires a multiple of 16 bytes.
    strides = [D if x.shape[i] == 1 else x.stride(i) for i in (0, 2, 1)]
    block = (1, 1, rows, columns or D)
    return TensorDescriptor(x, [B, H, S, D], [*strides, 1], [*block], tile_layout(block, x.dtype))


@functools.cache
def tile_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The shared memory layout of a tile that the copy engine moves."""
    return gl.NVMMASharedLayout.get_default_for([*block], DTYPES[dtype])


def counter(device: torch.device) -> Tensor:
    """The current stream's int32 counter for `next_tile` and the slots of `next_of_cluster`, made once.

    All of it is 0 between two launches.
    """
    if torch.cuda.is_current_stream_capturing():  # a graph may run on any stream; it zeroes this counter itself
        return torch.zeros(COUNTER_SIZE, dtype=torch.int32, device=device)
    return _counter_of(device, torch._C._cuda_getCurrentRawStream(device.index))


@functools.cache
def _counter_of(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(COUNTER_SIZE, dtype=torch.int32, device=device)


# -- checks


def supports(q: Tensor, k: Tensor, softcap: float | None, value_dim: int | None = None) -> str | None:
    """None, or the reason for refusing such q and k: the tail of "kernel=hopper ..."."""
    if reason := request_refusal(q, k, softcap):
        return reason
    if not q.is_cuda or arch(q) != 90:
        where = f"one of {arch(q) / 10}" if q.is_cuda else f"device {q.device}"
        return f"needs a GPU of compute capability 9.0, got {where}; kernel=auto takes what runs there"
    if triton_version() not in TESTED:
        return f"was tested with triton {', '.join(TESTED)}, got {triton.__version__}; kernel=portable takes any"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, got {q.dtype}; kernel=portable takes float32"
    if q.shape[3] not in HEAD_DIMS:
        return f"takes head_dim {', '.join(map(str, HEAD_DIMS))}, got {q.shape[3]}; kernel=portable takes others"
    if k.dtype != q.dtype or k.shape[3] != q.shape[3]:
        return f"takes k of q's dtype and head_dim, {q.dtype} and {q.shape[3]}, got {k.dtype} and {k.shape[3]}"
    if value_dim not in (None, q.shape[3]):
        return f"takes values of the keys' head_dim, {q.shape[3]}, got {value_dim}; kernel=portable takes others"
    return stride_refusal(q, k, copy_engine=True)


def check_inputs(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, intervals: Intervals, v: Tensor, **others: Tensor
) -> None:
    """Raise ValueError unless the kernels support these. v is like k; others: dout, like q."""
    if reason := supports(q, k, softcap, v.shape[-1]):
        raise ValueError(f"kernel=hopper {reason}")
    check_alike("hopper", q, k, scale, v=v, **others)
    check_addresses(v=v, **others)
    check_intervals("hopper", q, k, intervals)


def check_rows(like: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless each is fp32 and [B, S, H, D] or [B, H, S] of `like`, the former addressable by TMA."""
    checks.check_rows("hopper", like, **tensors)
    check_addresses(**{name: x for name, x in tensors.items() if x.dim() == 4})


def check_addresses(**tensors: Tensor) -> None:
    """Raise ValueError unless the copy engine can address each."""
    for name, x in tensors.items():
        if reason := address_refusal(name, x):
            raise ValueError(f"kernel=hopper {reason}")
