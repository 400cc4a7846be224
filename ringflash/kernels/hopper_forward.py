"""Attention forward for Hopper (sm_90), in Gluon: the mathematics of `portable_forward`, scheduled by hand.

There is one program per SM, which takes query tiles from a counter. A query tile has 2 or 3 x 64 rows of one head. A
consumer, one warpgroup (4 warps, the unit that issues wgmma), owns 64 of them. For a row, with s = q k^T,
c = scale log2(e) and the softmax state (m, z, acc):

    m' >= c max_j s_j - 8    p_j = 2^(c s_j - m')    a = 2^(m - m')    z' = a z + sum_j p_j    acc' = a acc + p v

and at the end out = acc / z, lse = ln(2) (m + log2 z). A carried Partial is such a state too: at head_dim 64 and 128 it
is merged at the end (`hopper_forward_128`), and at 256 a tile starts from it (`hopper_forward_256`).

m' only needs to be near the maximum, so m is kept until a weight would exceed 2^8. Then it becomes the maximum. So a is
1 in almost every step, and a warp whose rows all have a = 1 skips a acc, which is an eighth of its instructions at
head_dim 128. `hopper_softmax` has two ways to detect large weights: by the tile's maximum or, in full tiles at head_dim
64 and 256 (GUESS), by the weights themselves. See `portable_forward` for the softcap.

`start` and `end` never decrease. The bounds of a tile's first and last row therefore tell which KV tiles all of its
rows see (full) and which only some (edges):

    keys      lo ......... full_from ........................ hi
    tiles     | edge | edge |  full  |  full  |  full  | edge | edge |
    order         1      2       5        6        7       3     4

Edges come first: the first tile is computed before the loops and masked in any case, and the bounds of rows no longer
take registers when the full tiles run. The loop over full tiles is the same for every mask.

The producer is one warp, which starts copies. It also takes the query tiles; at head_dim 256, another warp does.
Consumers take turns in starting their products (named barriers). At head_dim 128 there are two, A and B. Their
registers hold p of one tile and the scores of the next, and the tensor cores run one consumer's products under the
other's exponentials:

    copy engine     k3 v2             k4 v3             k5 v4
    tensor cores    A: q k2, p1 v1  | B: q k2, p1 v1  | A: q k3, p2 v2  | B: q k3, p2 v2
    A               ............... | p2 = 2^(..)     | ............... | p3 = 2^(..)
    B               p1 = 2^(..)     | ............... | p2 = 2^(..)     | ...............

At head_dim 64, a step has half the products for the same number of exponentials. There are three consumers, and each
works in sequence: start p1 v1 and q k2, wait for both, compute p2 = 2^(..).

At head_dim 256, there are two such consumers, with 64 keys per step. Half of q's columns stay in registers, so that the
scores read a quarter less shared memory. Shared memory has no room for the carry and out, which therefore move directly
between registers and memory. Programs run in clusters of two if they can (`clustering`). The two compute the same query
tile of neighbouring heads of a group, or neighbouring tiles of a head if the group is odd. One copies k and the other
v, to both (`hopper_cluster`). A consumer's turn lasts until p v and the first half of its scores are done.
"""

# Annotations stay objects in this file (no `from __future__ import annotations`): Triton reads those of aggregates.
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from ringflash.intervals import Intervals, Order
from ringflash.kernels import hopper_forward_128, hopper_forward_256
from ringflash.kernels.checks import check_out, check_seen
from ringflash.kernels.gluon_names import triton_version
from ringflash.kernels.hopper_cluster import TRITON, Clustered, idle
from ringflash.kernels.hopper_forward_parts import OF_HEADS, OF_QUERIES, Call
from ringflash.kernels.hopper_parts import (
    L2_BYTES,
    REGISTERS,
    ROWS,
    check_addresses,
    check_inputs,
    check_rows,
    counter,
    supports,
    tiles,
)
from ringflash.kernels.portable_parts import (
    interval_stride,
    outputs,
    result_without_keys,
    score_scales,
    seen_argument,
    sm_count,
)
from ringflash.partial import Partial

__all__ = ["forward", "supports"]


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
    # hopper_forward_parts has addresses for this tuning alone.
    256: Tuning(consumers=2, block_k=64),
}
LEAST_KEYS = 8192  # that a query tile sees, on average, for clusters of two query tiles


@partial(Clustered, do_not_specialize=[
    "lse_stride_b", "lse_stride_h", "carry_stride_b", "carry_stride_s", "carry_stride_h", "out_stride_b",
    "out_stride_s", "out_stride_h", "final_stride_b", "final_stride_s", "final_stride_h", "seen_stride_b",
    "seen_later", "interval_stride_b", "order_stride_b", "tiles", "queries", "heads_kv", "group",
    "batch_heads", "heads_in_l2", "c", "cap_scale",
])  # fmt: skip
def forward_kernel(
    q, k, v, carry, out, final,
    carry_stride_b, carry_stride_s, carry_stride_h, out_stride_b, out_stride_s, out_stride_h,
    final_stride_b, final_stride_s, final_stride_h, seen, seen_stride_b, seen_later,
    lse, lse_stride_b, lse_stride_h,
    start, end, interval_stride_b, counter, order, order_stride_b, tiles,
    queries, heads_kv, group, batch_heads, heads_in_l2, c, cap_scale,
    D: gl.constexpr, BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    CAPPED: gl.constexpr, CARRY: gl.constexpr, FINISHES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Allocate shared memory and barriers, and start each group of warps.

    q, k and v are [B, H, S, D] for TMA. So are carry, out and final, except at head_dim 256, where they are pointers.
    """
    call = Call(
        lse, lse_stride_b, lse_stride_h, carry_stride_b, carry_stride_s, carry_stride_h, out_stride_b, out_stride_s,
        out_stride_h, final_stride_b, final_stride_s, final_stride_h, seen, seen_stride_b, seen_later,
        start, end, interval_stride_b, counter, order, order_stride_b, tiles, queries, heads_kv, group,
        batch_heads, heads_in_l2, c, cap_scale, D, BLOCK_K, CONSUMERS, CAPPED, CARRY, D != 128, CLUSTER, FINISHES,
    )  # fmt: skip
    tensors = (q, k, v, carry, out, final)
    if D == 256 and CLUSTER:
        shared = hopper_forward_256.make_shared(q.dtype, call)
        gl.warp_specialize(
            [
                (hopper_forward_256.consume, (call, shared, tensors, 0)),
                (hopper_forward_256.consume, (call, shared, tensors, 1)),
                (hopper_forward_256.produce, (call, shared, tensors)),
                (hopper_forward_256.schedule, (call, shared.jobs)),
                (idle, ()),  # the 11th and 12th warp, which Triton launches in any case
                (idle, ()),
            ],
            [4, 1, 1, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    elif D == 256:
        shared = hopper_forward_256.make_shared(q.dtype, call)
        gl.warp_specialize(
            [
                (hopper_forward_256.consume, (call, shared, tensors, 0)),
                (hopper_forward_256.consume, (call, shared, tensors, 1)),
                (hopper_forward_256.produce, (call, shared, tensors)),
                (hopper_forward_256.schedule, (call, shared.jobs)),
            ],
            [4, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    elif CONSUMERS == 2:
        shared = hopper_forward_128.make_shared(q.dtype, carry.dtype, call)
        gl.warp_specialize(
            [
                (hopper_forward_128.consume, (call, shared, tensors, 0)),
                (hopper_forward_128.consume, (call, shared, tensors, 1)),
                (hopper_forward_128.produce, (call, shared, tensors)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        shared = hopper_forward_128.make_shared(q.dtype, carry.dtype, call)
        gl.warp_specialize(
            [
                (hopper_forward_128.consume, (call, shared, tensors, 0)),
                (hopper_forward_128.consume, (call, shared, tensors, 1)),
                (hopper_forward_128.consume, (call, shared, tensors, 2)),
                (hopper_forward_128.produce, (call, shared, tensors)),
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
) -> Partial:
    """Attention over ``start:end`` of k and v, merged with carry. See `ringflash.kernels` for the contract.

    Raises ValueError, with the values, if `supports` refuses, if v or the carry do not fit q and k, or if scale is not
    positive (a row's maximum is taken before scaling).
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
    t = TUNINGS[D]
    registers = REGISTERS[t.consumers]
    order = intervals.query_order[t.consumers * ROWS.value]
    cluster = clustering(q, k, order, seen)
    if cluster == OF_QUERIES.value:
        order = intervals.query_order[2 * t.consumers * ROWS.value]
    in_place = carry is not None and carried is out  # then tiles that see nothing already have their result
    q_tiles = order.nonempty if in_place else order.tiles.shape[1]
    if not q_tiles:
        return state
    units, at_a_time = B * Hq * q_tiles, sm_count(q.device)
    if cluster == OF_HEADS.value:
        units //= 2
    launched = min(units, at_a_time // (2 if cluster else 1))
    direct = D == 256  # carry and out are pointers, not descriptors
    out_tiles = out if direct else tiles(out, ROWS.value)
    carry_tiles, final_tiles = (
        out_tiles if x is out else x if direct else tiles(x, ROWS.value) for x in (carried, final)
    )
    with torch.cuda.device_of(q):
        forward_kernel[(launched,)](
            *(tiles(q, ROWS.value), tiles(k, t.block_k), tiles(v, t.block_k)),
            *(carry_tiles, out_tiles, final_tiles, *carried.stride()[:3], *out.stride()[:3], *final.stride()[:3]),
            *seen_argument(seen, lse),
            *(lse, *lse.stride()[:2]),
            *(intervals.start, intervals.end, interval_stride(intervals.start)),
            *(counter(q.device), order.tiles, interval_stride(order.tiles), q_tiles),
            *(Sq, Hkv, Hq // Hkv, B * Hkv, min(heads_in_l2(q, k), B * Hkv), *score_scales(scale, softcap)),
            D=D, BLOCK_K=t.block_k, CONSUMERS=t.consumers,
            CONSUMER_REGISTERS=registers.consumer, PRODUCER_REGISTERS=registers.producer,
            CAPPED=softcap is not None, CARRY=carry is not None, FINISHES=final is not out, CLUSTER=cluster,
            num_warps=4, maxnreg=registers.launch, enable_fp_fusion=True,
        )  # fmt: skip
    return state


def clustering(q: Tensor, k: Tensor, order: Order, seen: Tensor | None) -> int:
    """What the two programs of a cluster, which read the same keys, work on: OF_HEADS, OF_QUERIES, or 0 for no cluster.

    With another version of Triton, clusters have not run on a GPU. Two query tiles together see more keys than each,
    which only pays if each sees many. All calls with `seen` need the same query tiles, whatever their masks.
    """
    if q.shape[3] != 256 or triton_version() != TRITON:
        return 0
    if q.shape[2] // k.shape[2] % 2 == 0:
        return OF_HEADS.value
    long = order.total >= LEAST_KEYS * order.tiles.shape[1]
    return OF_QUERIES.value if long and seen is None else 0


def heads_in_l2(q: Tensor, k: Tensor) -> int:
    """The number of KV heads, over batch rows, at a time: as many as keep K and V in L2, and at least 8 query heads.

    With fewer, SMs work on query tiles of more different lengths, and no longer read the same keys at the same time.
    With 16 query and KV heads at 32k tokens, 2 heads had 591 TFLOP/s, 4 660, 8 712 and 16 684.
    """
    _, Skv, Hkv, D = k.shape
    return max(-(-8 * Hkv // q.shape[2]), L2_BYTES // (2 * Skv * D * k.element_size()))
