"""Parts of both portable kernels: tunings, loads of tiles, masks, the softcap, and the checks of their inputs.

The kernels are in `portable_forward` and `portable_backward`. The Hopper kernels also use the host functions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ringflash.intervals import Intervals
from ringflash.kernels.checks import (
    OUT_DTYPES,
    address_refusal,
    check_alike,
    check_intervals,
    request_refusal,
    stride_refusal,
)
from ringflash.partial import Partial

HEAD_DIMS = range(32, 513, 8)  # a row of 16-bit values must be a multiple of 16 bytes, the copy engine's unit
LARGE_SHARED = (90, 100, 103)  # 227 KB per program, and products that read shared memory: large tiles pay
INTERPRETED_SMS = 4  # assumed for Triton's interpreter: a few programs
LOG2_E = 1.4426950408889634
NEG_INF = tl.constexpr(float("-inf"))
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E_ = tl.constexpr(LOG2_E)


@dataclass(frozen=True)
class Tuning:
    """Tile sizes and warps of one launch. Tiles are powers of two, at least 16."""

    block_q: int  # query rows per program (per step, in the kernel that loops over queries)
    block_k: int  # keys per step (per program, in the kernel that loops over queries)
    warps: int
    stages: int  # tiles in flight from memory
    tma: bool  # the copy engine loads tiles (sm_90 and up); otherwise each thread loads its own part
    columns: int = 256  # the most columns of a result that a program accumulates at a time

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k", "columns"):
            block = getattr(self, name)
            if block < 16 or block & (block - 1):
                raise ValueError(f"{name} must be a power of two, 16 or more, got {block}")

    def chunk(self, head_dim: int) -> int:
        """Columns of a result that are accumulated at a time: all of head_dim, or those of one of several passes."""
        return min(triton.next_power_of_2(head_dim), self.columns)


def exact_tuning(tma: bool) -> Tuning:
    """The tuning for fp32, whose products run on FMA units with both tiles in registers: larger tiles would spill."""
    return Tuning(16, 16, warps=8, stages=1, tma=tma)


def warps_of_64_rows(arch: int) -> int:
    """Warps of a program with 64 rows of a large head.

    If a product's result enters another product, Triton gives each warp 16 rows of its own. With wgmma, a second
    warpgroup would therefore repeat the scores. tcgen05 has one issuer, and its results need the registers of 8 warps.
    """
    return 8 if arch >= 100 else 4


def warps_of_whole_rows(head_dim: int, warps: int = 4) -> int:
    """Warps of a program that holds whole rows in registers: `warps` up to a head size of 256, then twice as many."""
    return warps if head_dim <= 256 else 2 * warps


# -- device code


@triton.jit
def tile_run(start_ptr, end_ptr, first, last, BLOCK: tl.constexpr):
    """The tiles that rows first..last see: the first key, the number of tiles, and which of them are full."""
    lo = tl.load(start_ptr + first)
    hi = tl.load(end_ptr + last)
    all_from = tl.load(start_ptr + last)
    all_to = tl.load(end_ptr + first)
    tiles = tl.cdiv(hi - lo, BLOCK)
    full_from = tl.minimum(tl.cdiv(all_from - lo, BLOCK), tiles)
    full_to = tl.maximum((all_to - lo) // BLOCK, full_from)
    return lo, tiles, full_from, full_to


@triton.jit
def load_tile(
    tensor, batch, head, row, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
    column=0,
):  # fmt: skip
    """Rows row..row + BLOCK of one head, BLOCK_D columns from `column` on, zero past the sequence and the head size.

    tensor: (descriptor or pointer, strides of batch, sequence and heads, length of the sequence). A descriptor has all
    four dimensions, which allows any strides. The compiler drops the first two, and products read the tile where the
    copy engine wrote it.
    """
    x, stride_b, stride_s, stride_h, length = tensor
    if TMA:
        tile = x.load([batch, head, row, column]).reshape([BLOCK, BLOCK_D])
    else:
        rows = row + tl.arange(0, BLOCK)
        columns = column + tl.arange(0, BLOCK_D)
        x += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        offsets = rows.to(tl.int64)[:, None] * stride_s + columns[None, :]
        tile = tl.load(x + offsets, (rows < length)[:, None] & (columns < D)[None, :], 0.0)
    return tile


@triton.jit
def visible(start, end, index):
    """Whether each index is in each row's start:end, [rows, indices]. One unsigned comparison, which wraps below."""
    past_start = (index[None, :] - start[:, None]).to(tl.uint32, bitcast=True)
    return past_start < (end - start).to(tl.uint32, bitcast=True)[:, None]


@triton.jit
def softcap(s, cap_scale):
    """tanh x and its derivative, x = s scale / softcap, cap_scale = 2 log2(e) scale / softcap.

    Both are within a few units of fp32's last place. u = 2 / (1 + e^2|x|) is 1 - tanh |x|. For small |x|, 1 - u would
    cancel, so tanh is the polynomial of Cephes' tanhf there. The derivative, (1 - tanh) (1 + tanh), is u (2 - u).
    """
    y = s * cap_scale
    x = y * (LN_2 / 2)
    u = 2.0 / (1.0 + tl.math.exp2(tl.abs(y)))
    z = x * x
    series = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    small = x + x * z * (series * z - 3.33332819422e-1)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(y < 0, u - 1.0, 1.0 - u)), u * (2.0 - u)


# -- launch


def arch(q: Tensor) -> int:
    """Compute capability as one number: 90 for 9.0, and 100 for Triton's interpreter."""
    return _arch(q.device) if q.is_cuda else 100


@functools.cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def sm_count(device: torch.device) -> int:
    """SMs of a GPU, or the number assumed for Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def score_scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """(c, cap_scale): the factor of scores in base 2, and their factor inside the softcap."""
    if softcap is None:
        return scale * LOG2_E, 0.0
    return softcap * LOG2_E, 2 * LOG2_E * scale / softcap


def interval_stride(bound: Tensor) -> int:
    """The stride between batch rows of bounds; 0 if all rows share them."""
    return bound.stride(0) if bound.shape[0] > 1 else 0


def tile_argument(
    name: str, x: Tensor, block: int, width: int, tma: bool
) -> tuple[Tensor | TensorDescriptor, int, int, int]:
    """The argument of `load_tile` for tiles of `block` rows and `width` columns, without the sequence's length.

    Raises ValueError if the copy engine cannot address x.
    """
    if not tma:
        return x, x.stride(0), x.stride(1), x.stride(2)
    if reason := address_refusal(name, x):
        raise ValueError(f"kernel=portable {reason}")
    B, S, H, D = x.shape
    # A dimension of size 1 may have any stride, but the copy engine still requires a multiple of 16 bytes.
    strides = [D if x.shape[i] == 1 else x.stride(i) for i in (0, 2, 1)]
    descriptor = TensorDescriptor(x, [B, H, S, D], [*strides, 1], [1, 1, block, width])
    return descriptor, 0, 0, 0


def result_without_keys(q: Tensor, carry: Partial | None, out: Tensor | None, seen: Tensor | None) -> Partial:
    """The result without queries or without keys: the carry, or the Partial of no keys."""
    if carry is not None and seen is not None:  # a later call of several, which sees nothing
        return carry
    state = Partial.identity(q) if carry is None else carry
    if out is None:
        return state
    out.copy_(state.out)
    return Partial(out, state.lse) if seen is None else state


def outputs(like: Tensor, carry: Partial | None, out: Tensor | None, seen: Tensor | None) -> tuple[Partial, Tensor]:
    """The Partial that a call writes and returns, and the tensor for tiles that no later call sees.

    With seen, the latter is `out`; without, it is the Partial's. like: a tensor of the result's shape.
    """
    B, S, H, _ = like.shape
    lse = torch.empty(B, H, S, dtype=torch.float32, device=like.device) if carry is None else carry.lse
    if out is not None and seen is None:
        return Partial(out, lse), out
    into = torch.empty(like.shape, dtype=torch.float32, device=like.device) if carry is None else carry.out
    return Partial(into, lse), into if out is None else out


def seen_argument(seen: Tensor | None, otherwise: Tensor) -> tuple[Tensor, int, int]:
    """`seen` as a kernel's arguments: a pointer, the stride of batch rows, and that to the counts of later calls."""
    if seen is None:
        return otherwise, 0, 0  # a pointer that is not read
    return seen, seen.stride(1) if seen.shape[1] > 1 else 0, seen.stride(0)


# -- checks


def supports(q: Tensor, k: Tensor, softcap: float | None, value_dim: int | None = None) -> str | None:
    """None, or the reason for refusing such q and k: the tail of "kernel=portable ...".

    value_dim: head_dim of the values; None for that of the keys.
    """
    return input_refusal(q, k, softcap, value_dim) or stride_refusal(q, k, copy_engine=arch(q) >= 90)


def input_refusal(q: Tensor, k: Tensor, softcap: float | None, value_dim: int | None) -> str | None:
    """Like `supports`, without the check of strides, which depends on how tiles are loaded."""
    if reason := request_refusal(q, k, softcap):
        return reason
    interpreted = not isinstance(tile_run, triton.JITFunction)
    if not interpreted and (not q.is_cuda or arch(q) < 80):
        where = f"one of {arch(q) / 10}" if q.is_cuda else f"device {q.device}"
        return f"needs a GPU of compute capability 8.0 or newer, or TRITON_INTERPRET=1 on the CPU, got {where}"
    if q.dtype not in OUT_DTYPES or k.dtype != q.dtype:
        return f"takes q and k both float16, bfloat16 or float32, got {q.dtype} and {k.dtype}"
    if interpreted and q.dtype == torch.bfloat16:
        return "cannot do bfloat16 in Triton's interpreter, which multiplies its raw bits; use float16 or float32"
    if q.shape[3] not in HEAD_DIMS or k.shape[3] != q.shape[3]:
        return f"takes head_dim 32 to 512 in steps of 8, the same for q and k, got {q.shape[3]} and {k.shape[3]}"
    if value_dim is not None and value_dim not in HEAD_DIMS:
        return f"takes values of head_dim 32 to 512 in steps of 8, got {value_dim}"
    return None


def check_inputs(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, intervals: Intervals, v: Tensor, **others: Tensor
) -> None:
    """Raise ValueError unless the kernels support these. others: dout, like q but with v's head_dim."""
    if reason := supports(q, k, softcap, v.shape[-1]):
        raise ValueError(f"kernel=portable {reason}")
    check_alike("portable", q, k, scale, v=v, **others)
    check_intervals("portable", q, k, intervals)
