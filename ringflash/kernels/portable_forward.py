"""Attention forward in plain Triton, sm_80 and up: every query row i attends to the keys start[i]:end[i].

One program holds BLOCK_Q query rows of one head and walks the keys BLOCK_K at a time. With s = q k^T, exponentials in
base 2 and c = scale log2(e), each tile updates the softmax state of a row (m its maximum, z its sum, acc its output):

    m' = max(m, c max_j s_j)      p_j = 2^(c s_j - m')           alpha = 2^(m - m')
    z' = alpha z + sum_j p_j      acc' = alpha acc + p v

and at the end out = acc / z, lse = ln(2) (m + log2 z). A carried Partial is such a state too, m = log2(e) lse, z = 1,
acc = out, and joins last. A softcap replaces s by tanh(s scale / softcap) and c by softcap log2(e); see `softcap`.

The intervals never decrease, so the rows' bounds at a tile's first and last row say which keys all rows see, which
none, and which only some (a full run with a masked edge on either side). The order is 1. full, 2. last, 3. edge:

    keys      lo ......... all_from ................ all_to ......... hi
    tiles     | edge | edge |  full  |  full  |  full  | last | edge |

What waits for what, in the full run; the tensor cores work on the next tile's scores during this tile's exponentials:

    copy engine     k2 v1        k3 v2        k4 v3
    tensor cores    s1 = q k1 |  s2 = q k2 . acc += p1 v1 |  s3 = q k3 . acc += p2 v2 |
    everything else           |  p1 = 2^(c s1 - m)        |  p2 = 2^(c s2 - m)        |
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ringflash.kernels.checks import number_refusal, request_refusal
from ringflash.mask import Intervals
from ringflash.partial import Partial

HEAD_DIMS = range(32, 257, 8)  # a row of 16-bit values must be a multiple of 16 bytes, the copy engine's unit
LARGE_SHARED = (90, 100, 103)  # 227 KB to a program, and products that read shared memory: large tiles pay
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2_E = 1.4426950408889634
NEG_INF = tl.constexpr(float("-inf"))
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E_ = tl.constexpr(LOG2_E)


@dataclass(frozen=True)
class Tuning:
    """How one launch is cut up. Tiles are powers of two, at least 16."""

    block_q: int  # query rows of a program (of a step, in the kernel that walks queries)
    block_k: int  # keys of a step (of a program, in the kernel that walks queries)
    warps: int
    stages: int  # tiles in flight from memory
    tma: bool  # tiles move by the copy engine (sm_90 and up); else each thread loads its own part

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            block = getattr(self, name)
            if block < 16 or block & (block - 1):
                raise ValueError(f"{name} must be a power of two, 16 or more, got {block}")


def tuning_for(head_dim: int, dtype: torch.dtype, arch: int) -> Tuning:
    """The forward's tiles for a head size, dtype and compute capability (80, 90, 100, ...)."""
    tma = arch >= 90
    if dtype == torch.float32:
        return exact_tuning(tma)
    if arch in LARGE_SHARED:
        if head_dim <= 64:  # two programs fit an SM and cover each other's exponentials: 370 TFLOP/s, full, H100
            return Tuning(128, 64, warps=4, stages=3, tma=tma)
        if head_dim <= 128:  # 511 TFLOP/s, full, H100; 479 with 64 keys and 3 stages. 224 of 227 KB
            return Tuning(128, 128, warps=8, stages=2, tma=tma)
        return Tuning(128, 32, warps=8, stages=2, tma=tma)  # 160 KB; 64 keys would take 256 KB
    # The largest tiles that do not spill with two tiles of scores in registers, and fit the 99 KB of sm_86 and sm_120.
    if head_dim <= 64:
        return Tuning(128, 64, warps=8, stages=3, tma=tma)
    if head_dim <= 128:
        return Tuning(128, 64, warps=8, stages=2, tma=tma)
    return Tuning(64, 32, warps=8, stages=2, tma=tma)


def exact_tuning(tma: bool) -> Tuning:
    """fp32 products run on the FMA units, whole rows of both tiles in registers: larger ones spill. For checks."""
    return Tuning(16, 16, warps=8, stages=1, tma=tma)


# -- what the kernels of both directions share


@triton.jit
def tile_run(start_ptr, end_ptr, first, last, BLOCK: tl.constexpr):
    """The tiles that rows first..last see: where they begin, how many, and which of them every row sees whole."""
    lo = tl.load(start_ptr + first)
    hi = tl.load(end_ptr + last)
    all_from = tl.load(start_ptr + last)
    all_to = tl.load(end_ptr + first)
    tiles = tl.cdiv(hi - lo, BLOCK)
    full_from = tl.minimum(tl.cdiv(all_from - lo, BLOCK), tiles)
    full_to = tl.maximum((all_to - lo) // BLOCK, full_from)
    return lo, tiles, full_from, full_to


@triton.jit
def load_tile(tensor, batch, head, row, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """Rows row..row + BLOCK of one head, zero past the sequence and the head size: [BLOCK, BLOCK_D].

    tensor: (descriptor or pointer, stride of batch, of sequence, of heads, length of the sequence). A descriptor has
    all four dimensions, so that any strides will do; the compiler drops the leading two, and products read the tile
    where the copy engine put it.
    """
    x, stride_b, stride_s, stride_h, length = tensor
    if TMA:
        tile = x.load([batch, head, row, 0]).reshape([BLOCK, BLOCK_D])
    else:
        rows = row + tl.arange(0, BLOCK)
        columns = tl.arange(0, BLOCK_D)
        x += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        offsets = rows.to(tl.int64)[:, None] * stride_s + columns[None, :]
        tile = tl.load(x + offsets, (rows < length)[:, None] & (columns < D)[None, :], 0.0)
    return tile


@triton.jit
def visible(start, end, index):
    """Which of the indices lie in each row's start:end, [rows, indices]. One comparison: unsigned wraps below start."""
    past_start = (index[None, :] - start[:, None]).to(tl.uint32, bitcast=True)
    return past_start < (end - start).to(tl.uint32, bitcast=True)[:, None]


@triton.jit
def softcap(s, cap_scale):
    """tanh x and its derivative, x = s scale / softcap, cap_scale = 2 log2(e) scale / softcap.

    Both are within a few units of fp32's last place. u = 2 / (1 + e^2|x|) is 1 - tanh |x|. For small |x|, 1 - u would
    cancel: there tanh is the polynomial of Cephes' tanhf. The derivative, (1 - tanh) (1 + tanh), is u (2 - u).
    """
    y = s * cap_scale
    x = y * (LN_2 / 2)
    u = 2.0 / (1.0 + tl.math.exp2(tl.abs(y)))
    z = x * x
    series = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    small = x + x * z * (series * z - 3.33332819422e-1)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(y < 0, u - 1.0, 1.0 - u)), u * (2.0 - u)


# -- the forward


@triton.jit
def softmax_step(s, m, z, c, EDGE: tl.constexpr):
    """Fold a tile of scores into a row's maximum and sum: the weights p, the new m and z, and what acc is scaled by."""
    m_new = tl.maximum(m, tl.max(s, 1) * c)
    shift = m_new
    if EDGE:
        shift = tl.where(m_new == NEG_INF, 0.0, m_new)  # a row that has seen nothing: -inf - -inf would be NaN
    p = tl.math.exp2(s * c - shift[:, None])
    alpha = tl.math.exp2(m - shift)
    return p, m_new, z * alpha + tl.sum(p, 1), alpha


@triton.jit(do_not_specialize=["carried"])
def forward_kernel(
    q, q_stride_b, q_stride_s, q_stride_h,
    k, k_stride_b, k_stride_s, k_stride_h,
    v, v_stride_b, v_stride_s, v_stride_h,
    out, out_stride_b, out_stride_s, out_stride_h,
    carry, carry_stride_b, carry_stride_s, carry_stride_h,
    lse, lse_stride_b, lse_stride_h,
    start, end, interval_stride_b,
    queries, keys, heads_kv, carried, c, cap_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, CAPPED: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """One query tile of one head. Launched heads of a group first, then tiles from the last, then KV heads and batch.

    The last tile of a causal mask sees the most keys: started first, the short ones fill the gaps at the end. The heads
    that share K and V run side by side, so that their tiles come from L2.
    """
    program = tl.program_id(0)
    q_tiles = tl.cdiv(queries, BLOCK_Q)
    first = (q_tiles - 1 - program // GROUP % q_tiles) * BLOCK_Q
    head_kv = program // (GROUP * q_tiles) % heads_kv
    batch = program // (GROUP * q_tiles) // heads_kv
    head = head_kv * GROUP + program % GROUP

    q = (q, q_stride_b, q_stride_s, q_stride_h, queries)
    k = (k, k_stride_b, k_stride_s, k_stride_h, keys)
    v = (v, v_stride_b, v_stride_s, v_stride_h, keys)
    start += batch.to(tl.int64) * interval_stride_b
    end += batch.to(tl.int64) * interval_stride_b
    last = tl.minimum(first + BLOCK_Q, queries) - 1
    lo, tiles, full_from, full_to = tile_run(start, end, first, last, BLOCK_K)
    if IN_PLACE and tiles == 0:
        return
    # The tile after the full run is computed on its own, to drain the loop. There always is one: where the full run
    # reaches the end, its own last tile, and where the rows see nothing, an empty one.
    tiles = tl.maximum(tiles, 1)
    full_from = tl.minimum(full_from, tiles - 1)
    full_to = tl.maximum(full_from, tl.minimum(full_to, tiles - 1))

    m = tl.full([BLOCK_Q], NEG_INF, tl.float32)
    z = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    q_tile = load_tile(q, batch, head, first, BLOCK_Q, BLOCK_D, D, TMA)

    # 1. Tiles that every row sees whole: no mask.
    full_key = lo + full_from * BLOCK_K
    k_tile = load_tile(k, batch, head_kv, full_key, BLOCK_K, BLOCK_D, D, TMA)
    s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
    for key in tl.range(full_key, lo + full_to * BLOCK_K, BLOCK_K, num_stages=STAGES):
        k_tile = load_tile(k, batch, head_kv, key + BLOCK_K, BLOCK_K, BLOCK_D, D, TMA)
        s_next = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        if CAPPED:
            s, _ = softcap(s, cap_scale)
        p, m, z, alpha = softmax_step(s, m, z, c, EDGE=False)
        v_tile = load_tile(v, batch, head_kv, key, BLOCK_K, BLOCK_D, D, TMA)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
        s = s_next

    # 2. The tile after them, whose scores are there already.
    rows = first + tl.arange(0, BLOCK_Q)
    valid = rows < queries
    row_start = tl.load(start + rows, valid, 0)
    row_end = tl.load(end + rows, valid, 0)
    key = lo + full_to * BLOCK_K
    if CAPPED:
        s, _ = softcap(s, cap_scale)
    s = tl.where(visible(row_start, row_end, key + tl.arange(0, BLOCK_K)), s, NEG_INF)
    p, m, z, alpha = softmax_step(s, m, z, c, EDGE=True)
    v_tile = load_tile(v, batch, head_kv, key, BLOCK_K, BLOCK_D, D, TMA)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")

    # 3. Tiles that only some rows see, before the full run and beyond the tile after it.
    for tile in tl.range(0, tiles - 1 - (full_to - full_from), num_stages=STAGES):
        key = lo + tl.where(tile < full_from, tile, tile + 1 + full_to - full_from) * BLOCK_K
        k_tile = load_tile(k, batch, head_kv, key, BLOCK_K, BLOCK_D, D, TMA)
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        if CAPPED:
            s, _ = softcap(s, cap_scale)
        s = tl.where(visible(row_start, row_end, key + tl.arange(0, BLOCK_K)), s, NEG_INF)
        p, m, z, alpha = softmax_step(s, m, z, c, EDGE=True)
        v_tile = load_tile(v, batch, head_kv, key, BLOCK_K, BLOCK_D, D, TMA)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")

    # The carried state joins here rather than at the start: its addresses would hold registers through the loops. Where
    # there is none nothing is loaded. (A kernel compiled without this part ran no exponentials under its products:
    # what ptxas overlaps in the loop depends on what follows it. tests/kernels/test_compiles.py keeps watch.)
    columns = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (columns < D)[None, :]
    lse += batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h
    m_carry = tl.load(lse + rows, valid & (carried > 0), NEG_INF) * LOG2_E_
    carry += batch.to(tl.int64) * carry_stride_b + head.to(tl.int64) * carry_stride_h
    carry += rows.to(tl.int64)[:, None] * carry_stride_s + columns[None, :]
    m_new = tl.maximum(m, m_carry)
    shift = tl.where(m_new == NEG_INF, 0.0, m_new)
    alpha, alpha_carry = tl.math.exp2(m - shift), tl.math.exp2(m_carry - shift)
    acc = acc * alpha[:, None] + tl.load(carry, inside & (carried > 0), 0.0) * alpha_carry[:, None]
    z = z * alpha + alpha_carry
    seen = z > 0
    z = tl.where(seen, z, 1.0)  # a row that has seen nothing: acc is 0 already
    tl.store(lse + rows, tl.where(seen, (m_new + tl.math.log2(z)) * LN_2, NEG_INF), valid)
    acc = acc / z[:, None]
    out += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    tl.store(out + rows.to(tl.int64)[:, None] * out_stride_s + columns[None, :], acc.to(out.dtype.element_ty), inside)


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
    tuning: Tuning | None = None,
) -> Partial:
    """Attention over ``start:end`` of k and v, merged with carry. See `ringflash.kernels` for the contract.

    Raises ValueError, with the values, where `supports` would refuse, where v or the carry do not fit q and k, and
    where scale is not positive (a row's maximum is taken before scaling). tuning replaces the table's choice.
    """
    check_inputs(q, k, scale, softcap, v=v)
    check_intervals(q, k, intervals)
    if carry is not None:
        check_rows(q, **{"carry.out": carry.out, "carry.lse": carry.lse})
    if out is not None:
        check_out(q, out)
    if 0 in q.shape or 0 in k.shape:
        return nothing_seen(q, carry, out)

    B, Sq, Hq, D = q.shape
    _, Skv, Hkv, _ = k.shape
    if carry is None:
        lse = torch.empty(B, Hq, Sq, dtype=torch.float32, device=q.device)
        carried = (lse, 0, 0, 0)  # some pointer, not read
    else:
        lse = carry.lse
        carried = (carry.out, carry.out.stride(0), carry.out.stride(1), carry.out.stride(2))
    in_place = carry is not None and out is None
    if out is None:
        out = torch.empty(q.shape, dtype=torch.float32, device=q.device) if carry is None else carry.out
    t = tuning or tuning_for(D, q.dtype, arch(q))
    with torch.cuda.device_of(q):
        forward_kernel[(B * Hq * triton.cdiv(Sq, t.block_q),)](
            *tile_argument("q", q, t.block_q, t.tma),
            *tile_argument("k", k, t.block_k, t.tma),
            *tile_argument("v", v, t.block_k, t.tma),
            *(out, *out.stride()[:3]),
            *carried,
            *(lse, *lse.stride()[:2]),
            *(intervals.start, intervals.end, interval_stride(intervals.start)),
            *(Sq, Skv, Hkv, int(carry is not None), *score_scales(scale, softcap)),
            GROUP=Hq // Hkv, D=D, BLOCK_D=triton.next_power_of_2(D), BLOCK_Q=t.block_q, BLOCK_K=t.block_k,
            STAGES=t.stages, TMA=t.tma, CAPPED=softcap is not None, IN_PLACE=in_place,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return Partial(out, lse)


def arch(q: Tensor) -> int:
    """Compute capability as one number, 90 for 9.0; Triton's interpreter takes what the newest takes."""
    return _arch(q.device) if q.is_cuda else 100


@functools.cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def score_scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """(c, cap_scale): what multiplies scores in base 2, and what multiplies them inside the cap."""
    if softcap is None:
        return scale * LOG2_E, 0.0
    return softcap * LOG2_E, 2 * LOG2_E * scale / softcap


def interval_stride(bound: Tensor) -> int:
    """From one batch row's bounds to the next: 0 where all rows share them."""
    return bound.stride(0) if bound.shape[0] > 1 else 0


def tile_argument(name: str, x: Tensor, block: int, tma: bool) -> tuple[Tensor | TensorDescriptor, int, int, int]:
    """What `load_tile` reads tiles of `block` rows from, and the strides of batch, sequence and heads.

    Raises ValueError where the copy engine cannot address x.
    """
    if not tma:
        return x, x.stride(0), x.stride(1), x.stride(2)
    if reason := tma_refusal(name, x):
        raise ValueError(f"kernel=portable {reason}")
    B, S, H, D = x.shape
    # A dimension of size 1 may have any stride; the copy engine wants a multiple of 16 bytes all the same.
    strides = [D if x.shape[i] == 1 else x.stride(i) for i in (0, 2, 1)]
    descriptor = TensorDescriptor(x, [B, H, S, D], [*strides, 1], [1, 1, block, triton.next_power_of_2(D)])
    return descriptor, 0, 0, 0


# -- what can be asked for


def supports(q: Tensor, k: Tensor, softcap: float | None) -> str | None:
    """None, or why not: the tail of "kernel=portable ..." for queries like q and keys and values like k."""
    if reason := request_refusal(q, k, softcap):
        return reason
    interpreted = not isinstance(forward_kernel, triton.JITFunction)
    if not interpreted and (not q.is_cuda or arch(q) < 80):
        where = f"one of {arch(q) / 10}" if q.is_cuda else f"device {q.device}"
        return f"needs a GPU of compute capability 8.0 or newer, or TRITON_INTERPRET=1 on the CPU, got {where}"
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        return f"takes q and k both float16, bfloat16 or float32, got {q.dtype} and {k.dtype}"
    if interpreted and q.dtype == torch.bfloat16:
        return "cannot do bfloat16 in Triton's interpreter, which multiplies its raw bits; use float16 or float32"
    if q.shape[3] not in HEAD_DIMS or k.shape[3] != q.shape[3]:
        return f"takes head_dim 32 to 256 in steps of 8, the same for q and k, got {q.shape[3]} and {k.shape[3]}"
    for name, x in (("q", q), ("k", k)):
        if x.stride(3) != 1:
            return f"takes a contiguous last dimension, got {name} with stride {x.stride(3)}"
        if arch(q) >= 90 and (reason := tma_refusal(name, x)):
            return reason
    return None


def tma_refusal(name: str, x: Tensor) -> str | None:
    """Why the copy engine cannot address x, if it cannot."""
    if x.data_ptr() % 16:
        return f"takes tensors that begin at a multiple of 16 bytes, got {name} at {x.data_ptr() % 16} past one"
    width = x.element_size()
    for dimension, (count, stride) in enumerate(zip(x.shape[:3], x.stride(), strict=False)):
        if count > 1 and stride * width % 16:
            size = stride * width
            return f"takes strides that are multiples of 16 bytes, got {name} with stride({dimension}) of {size} bytes"
    return None


def check_inputs(q: Tensor, k: Tensor, scale: float, softcap: float | None, **others: Tensor) -> None:
    """Raise ValueError unless the kernels take these; others: v as k is, dout as q is."""
    if reason := supports(q, k, softcap):
        raise ValueError(f"kernel=portable {reason}")
    check_alike(q, k, scale, **others)


def check_alike(q: Tensor, k: Tensor, scale: float, **others: Tensor) -> None:
    """What is left of check_inputs where `supports` has been asked."""
    if reason := number_refusal(scale):
        raise ValueError(f"kernel=portable takes as scale {reason}")
    for name, x in others.items():
        like = q if name == "dout" else k
        if x.shape != like.shape or x.dtype != like.dtype or x.device != like.device or x.stride(3) != 1:
            raise ValueError(
                f"kernel=portable takes {name} as {[*like.shape]}, {like.dtype}, last dimension contiguous, on "
                f"{like.device}, got {[*x.shape]}, {x.dtype}, strides {x.stride()}, on {x.device}"
            )


def check_rows(like: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless each is fp32, contiguous in its last dimension, [B, S, H, D] or [B, H, S] of `like`."""
    B, S, H, D = like.shape
    for name, x in tensors.items():
        shape = (B, H, S) if x.dim() == 3 else (B, S, H, D)
        contiguous = x.stride(-1) == 1 or x.shape[-1] == 1
        if x.shape != shape or x.dtype != torch.float32 or not contiguous:
            raise ValueError(
                f"kernel=portable takes {name} as {[*shape]}, torch.float32, last dimension contiguous, "
                f"got {[*x.shape]}, {x.dtype}, strides {x.stride()}"
            )


def check_out(q: Tensor, out: Tensor) -> None:
    """Raise ValueError unless out is of q's shape, in a dtype that kernels write, contiguous in its last dimension."""
    if out.shape != q.shape or out.dtype not in DTYPES or out.stride(3) != 1:
        raise ValueError(
            f"kernel=portable takes out as {[*q.shape]}, float16, bfloat16 or float32, last dimension contiguous, "
            f"got {[*out.shape]}, {out.dtype}, strides {out.stride()}"
        )


def nothing_seen(q: Tensor, carry: Partial | None, out: Tensor | None) -> Partial:
    """The result where there are no queries or no keys: the carry, or a Partial that has seen nothing."""
    state = Partial.identity(q) if carry is None else carry
    return state if out is None else Partial(out.copy_(state.out), state.lse)


def check_intervals(q: Tensor, k: Tensor, intervals: Intervals) -> None:
    """Raise ValueError unless every query and key has its bounds, as contiguous rows of int32."""
    for x, bounds in ((q, ("start", "end")), (k, ("query_start", "query_end"))):
        for name in bounds:
            bound = getattr(intervals, name)
            fits = bound.dim() == 2 and bound.shape[0] in (1, len(x)) and bound.shape[1] == x.shape[1]
            if not fits or bound.dtype != torch.int32 or not bound.is_contiguous():
                raise ValueError(
                    f"kernel=portable takes intervals.{name} as [1 or {len(x)}, {x.shape[1]}], torch.int32, "
                    f"contiguous, got {[*bound.shape]}, {bound.dtype}, strides {bound.stride()}"
                )
