"""What both Hopper kernels are made of: barriers, pipes between warps, tiles of a program and of the copy engine.

And what either refuses. The kernels are in `hopper_forward` and `hopper_backward`.
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

from ringflash.kernels import checks
from ringflash.kernels.checks import address_refusal, check_alike, check_intervals, request_refusal, stride_refusal
from ringflash.kernels.gluon_names import TESTED, aggregate, copy_in, triton_version
from ringflash.kernels.portable_parts import LOG2_E, arch
from ringflash.mask import Intervals

ROWS = gl.constexpr(64)  # of a consumer's tile: what one wgmma computes
NEG_INF = gl.constexpr(float("-inf"))
# tanh x = x + a x^3 + b x^5 within 1e-6 of itself up to x = 1/4, of y = 2 log2(e) x
SMALL = gl.constexpr(0.25 * 2 * LOG2_E)
SERIES_1, SERIES_3, SERIES_5 = (
    gl.constexpr(coefficient / (2 * LOG2_E) ** power)
    for power, coefficient in ((1, 1.0), (3, -0.33326131), (5, 0.12914957))
)
FIRST_BARRIER = (
    8  # of the 16 that warps meet at by number. Triton takes those from 0: one per partition, two of its own
)
L2_BYTES = 32 << 20  # of 50 MB: what a program's heads read again and again; the rest is for what streams through
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class Registers:
    """A thread's registers: at launch an equal share of an SM's 65536, then what setmaxnreg gives each kind of warp."""

    launch: int
    consumer: int
    producer: int  # its warp is padded to a warpgroup


REGISTERS = {2: Registers(168, 240, 24), 3: Registers(128, 160, 32)}  # by the number of consumers


# -- barriers that warps meet at by number: a warp arrives and continues; an mbarrier makes its warpgroup meet


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


@gluon.constexpr_function
def product_layout(columns):
    """Who holds what of a wgmma's result, [64, columns]: registers of a warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


# -- shared memory on its way from one warp to another


@gluon.jit
def opaque_zero(number):
    """0 of a step's number, which is below 2^30; the compiler does not know that it is always 0.

    An address to which it is added is computed in every step: two or three instructions. Without it, the compiler keeps
    the constant addresses of all operands in registers over the loop, where there are too few, and spills them.
    """
    return number >> 30


@aggregate
class Pipe:
    """DEPTH tiles of shared memory. Tiles are numbered from 0 as they come; number n lies in slot n % DEPTH.

    full[slot] is signalled by the copy engine when all bytes have landed. A slot's one reader, a warpgroup, reports it
    empty through empty[slot]; several READERS do so at the barrier EMPTY + slot, at which their warps arrive one by
    one.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    DEPTH: gl.constexpr
    READERS: gl.constexpr
    EMPTY: gl.constexpr

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
        """Wait for the readers of the tile that had the slot before. For the producer, a warp."""
        if self.READERS == 1:
            mbarrier.wait(self.empty.index(number % self.DEPTH), (number // self.DEPTH & 1) ^ 1)
        elif number >= self.DEPTH:
            sync(self.EMPTY + number % self.DEPTH, 32 + 128 * self.READERS, 1)

    @gluon.jit
    def release(self, number):
        """Say that this warpgroup has read a tile."""
        if self.READERS == 1:
            mbarrier.arrive(self.empty.index(number % self.DEPTH), count=1)
        else:
            arrive(self.EMPTY + number % self.DEPTH, 32 + 128 * self.READERS)

    @gluon.jit
    def load(self, number, descriptor, batch, head, row):
        """Order the copy of a tile from row `row` of a [B, H, S, D] tensor, once its slot is empty."""
        self.wait_empty(number)
        self.copy(number, descriptor, batch, head, row)

    @gluon.jit
    def copy(self, number, descriptor, batch, head, row):
        """Order the copy of a tile whose slot is empty."""
        full = self.full.index(number % self.DEPTH)
        mbarrier.expect(full, descriptor.block_type.nbytes)
        copy_in(descriptor, [batch, head, row, 0], full, self.tiles.index(number % self.DEPTH))


@gluon.jit
def make_tiles(dtype: gl.constexpr, COUNT: gl.constexpr, BLOCK: gl.constexpr, COLUMNS: gl.constexpr):
    """Shared memory for COUNT tiles [BLOCK, COLUMNS], as wgmma and the copy engine lay them out."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, COLUMNS], dtype)
    return gl.allocate_shared_memory(dtype, [COUNT, BLOCK, COLUMNS], layout)


@gluon.jit
def make_pipe(
    dtype: gl.constexpr, DEPTH: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr,
    READERS: gl.constexpr = 1, EMPTY: gl.constexpr = 0, WRITERS: gl.constexpr = 1,
):  # fmt: skip
    """A Pipe of [BLOCK, D] tiles. EMPTY: for several readers, the first of DEPTH barriers. READERS: 0 for memory alone.

    WRITERS: 2 where a tile is full when its producer has arrived as well at full[slot], beside the copy engine.
    An mbarrier is made only where warps wait at it. Triton lays the next tiles over one that is initialised and no
    more, and PTX leaves undefined what its memory then holds.
    """
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = make_tiles(dtype, DEPTH, BLOCK, D)
    full, empty = tiles, tiles  # what is not there is not read
    if READERS > 0:
        full = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], barrier_layout)
    if READERS == 1:
        empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], barrier_layout)
    for slot in gl.static_range(DEPTH):
        if READERS > 0:
            mbarrier.init(full.index(slot), count=WRITERS)
        if READERS == 1:
            mbarrier.init(empty.index(slot), count=1)
    return Pipe(tiles, full, empty, DEPTH, READERS, EMPTY)


# -- which tiles a program works on


@aggregate
class Job:
    """A tile of rows and the tiles of columns they see: `edges` that are masked, then the full ones.

    Rows and columns are queries and keys in the forward, keys and queries in the backward.
    """

    batch: gl.tensor
    head: gl.tensor
    head_kv: gl.tensor
    first_row: gl.tensor
    lo: gl.tensor
    tiles: gl.tensor
    edges: gl.tensor
    full_from: gl.tensor
    into: gl.tensor  # in the forward, where the tile's result goes: OUT, FINAL or NOWHERE

    @gluon.jit
    def fields(self):
        """The job as a vector of 8, for `receive_job`: all but the KV head, of which consumers know nothing."""
        i = gl.arange(0, 8, layout=gl.BlockedLayout([1], [32], [1], [0]))
        heads = gl.where(i == 1, self.head, gl.where(i == 2, self.into, self.first_row))
        where = gl.where(i == 0, self.batch, heads)
        what = gl.where(i == 4, self.lo, gl.where(i == 5, self.tiles, gl.where(i == 6, self.edges, self.full_from)))
        return gl.where(i < 4, where, what)


@gluon.jit
def receive_job(fields):
    """The job whose fields are these 8, in shared memory. For a warpgroup."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])  # each thread reads them all
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
    """The next number of those below `total` that programs take as they come, each having begun with its own.

    So one that starts late, because its SM had another kernel's work to finish, takes fewer. For a warp. Each of the
    numbers begun is followed by one take, so that the last one is known: it leaves the counter at 0, as it was found.
    """
    thread = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    taken = gl.atomic_add(counter + thread, thread * 0 + 1, mask=thread == 0, sem="relaxed")
    taken = gl.sum(gl.where(thread == 0, taken, 0), 0)
    gl.store(counter + thread, thread * 0, mask=(thread == 0) & (taken == total - 1))
    return gl.num_programs(0) + taken


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


# -- scores


@gluon.constexpr_function
def mask_scores_asm(count, value):
    """PTX: registers $0.. of a thread's two rows become `value` where a row does not see their column.

    A thread has columns 2 (lane % 4) + 8 k and the one after it, of its first row and then of its second, for k = 0,
    1, ... Operands, after those of the tile: start - first_column, then end - start, `count` each. One comparison per
    column: unsigned wraps below start.
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
    """`count` results, which begin as the first `count` operands, and twice as many others."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * 2 * count)


@gluon.jit
def mask_scores(s, start, end, first_column, value: gl.constexpr):
    """s [rows, columns], of a wgmma, with `value` (PTX) where column `first_column` + j is not in the row's start:end.

    In PTX, for Triton would make each thread's columns again from the bits of its number: 237 instructions instead of
    112 in a step of the backward.
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
    """tanh(s scale / softcap), with cap_scale = 2 log2(e) scale / softcap, within a few 1e-6 of itself.

    1 - 2 / (1 + 2^y), but for small y, where that cancels: a polynomial. See `portable_parts.softcap`.
    """
    y = s * cap_scale
    reciprocal = gl.inline_asm_elementwise(  # in one instruction, where Triton's division takes several
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + gl.exp2(y)], dtype=gl.float32, is_pure=True, pack=1
    )
    square = y * y
    small = y * ((SERIES_5 * square + SERIES_3) * square + SERIES_1)
    return gl.where(gl.abs(y) < SMALL, small, 1.0 - 2.0 * reciprocal)


# -- launch


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


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def counter(device: torch.device) -> Tensor:
    """An int32 that is 0 between two launches on the current stream, and its alone: made once, see `next_tile`."""
    if torch.cuda.is_current_stream_capturing():  # a graph may run on any stream, and fills what it keeps by itself
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _counter_of(device, torch._C._cuda_getCurrentRawStream(device.index))


@functools.cache
def _counter_of(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


# -- what can be asked for


def supports(q: Tensor, k: Tensor, softcap: float | None, value_dim: int | None = None) -> str | None:
    """None, or why not: the tail of "kernel=hopper ..." for queries like q and keys and values like k."""
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
    """Raise ValueError unless the kernels take these; v as k is, others: dout as q is."""
    if reason := supports(q, k, softcap, v.shape[-1]):
        raise ValueError(f"kernel=hopper {reason}")
    check_alike("hopper", q, k, scale, v=v, **others)
    check_addresses(v=v, **others)
    check_intervals("hopper", q, k, intervals)


def check_rows(like: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless each is fp32 and [B, S, H, D] or [B, H, S] of `like`, the former as TMA takes it."""
    checks.check_rows("hopper", like, **tensors)
    check_addresses(**{name: x for name, x in tensors.items() if x.dim() == 4})


def check_addresses(**tensors: Tensor) -> None:
    """Raise ValueError unless the copy engine can address each."""
    for name, x in tensors.items():
        if reason := address_refusal(name, x):
            raise ValueError(f"kernel=hopper {reason}")
