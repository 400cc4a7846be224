"""ring_attention: exact attention over a sequence sharded across ranks.

Forward. Keys and values travel round the ring. The queries stay, and each hop's kernel updates their running
(out, lse). While hop s is computed, the keys of hop s + 1 are sent. Heads are computed in two halves, each on its own
stream (`ring.streams`):

    rank r      compute   | own keys      | keys of r - 1 | keys of r - 2 | ...
                transfer  | keys of r - 1 | keys of r - 2 | keys of r - 3 | ...

Backward. Given delta = rowsum(dout * out) and the global lse, each block's gradient is independent of the others. Keys
and values travel round the ring again. Their gradients follow in fp32, one hop later, and each rank's kernel adds to
them. A rank computes its own keys last and adds to the gradients that have returned. One half's gradients are sent
while the kernel adds to the other's:

    rank r      compute   | hop s, half 0          | hop s, half 1              | hop s + 1, half 0 ...
                transfer  | dk, dv of half 1, s-1  | dk, dv of half 0, s        | dk, dv of half 1, s ...

Only what later ranks see is sent (`ring.routes`). In layouts of several chunks per rank, such as balanced ones, a hop
of the forward brings the keys of four ranks at once (`ring.key_hops`).

The additional memory does not depend on the ring's size:

- two shards of keys and values, and in the forward the running result in fp32. Where hops bring the keys of four ranks,
  up to eight shards, of what is seen alone: in 16 bits, about what the backward's keys and gradients take;
- in the backward also two shards of gradients, and a hop's centered keys if the kernel does not center them itself
  (`kernels.compensation`);
- a third shard of gradients if a rank's own gradients return while it still forwards those of others, as with
  documents, wide windows or contiguous layouts.

On a ring of one, the backward processes groups of heads, so that only one group's fp32 gradients exist at a time: its
dq, since dk and dv are written in 16 bits (`AttentionPlan.writes_gradients`). With one KV head, heads cannot be halved;
in a ring, the backward then has two sections, a quarter of the keys and the rest.
"""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ringflash import kernels
from ringflash.kernels.checks import check_tensors, like_out
from ringflash.layout import Layout
from ringflash.mask import IntervalMask, check_mask
from ringflash.ring import recompute
from ringflash.ring.checks import check_call
from ringflash.ring.execution import Memory, run
from ringflash.ring.passes import Backward, Forward, Layer, Saved, concatenate
from ringflash.ring.plan import AttentionPlan
from ringflash.ring.transport import Loopback
from ringflash.ring.watchdog import Label

# Of fp32 gradients at once on a ring of one: 16384 tiles of 128 rows of 128, which fill any GPU. Where the Hopper
# kernel divides 8 or more query heads of a KV head among programs, it holds dk and dv in fp32, too: a quarter as much.
GROUP_BYTES = 2**30


class Options(TypedDict, total=False):
    """What ring_attention and flash_attention take by keyword alone."""

    scale: float | None
    softcap: float | None
    sink: Tensor | None
    kernel: str
    deterministic: bool
    compensated: bool


@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *,
    return_lse: Literal[False] = False, layer: int | None = None, **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *,
    return_lse: Literal[True], layer: int | None = None, **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@torch.compiler.disable(reason="streams and exchanges cannot be part of a compiled graph")
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    kernel: str = "auto",
    deterministic: bool = False,
    compensated: bool = True,
    return_lse: bool = False,
    layer: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the whole sequence, differentiable.

    - q [B, S, Hq, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv]: fp16, bf16 or fp32. S is the layout's shard length, and Hq
      is a multiple of Hkv. The last dimension is contiguous, and other strides are free. With a Loopback ring, B is
      ranks x batch, with ranks outermost.
    - plan: the step's mask, layout and ring.
    - scale: above 0; by default D ** -0.5.
    - softcap: scores become softcap * tanh(scores / softcap); None for no cap.
    - sink [Hq], differentiable: a logit per head that takes part in the softmax and has no value (gpt-oss), not capped.
    - kernel: hopper, portable, blocked, or auto, the fastest that supports the request (`kernels.select`).
    - deterministic: gradients are bit-equal from run to run, which is slower on Hopper.
    - compensated: gradients are protected from the rounding of out (`kernels.compensation`).
    - return_lse: also return the log-sum-exp.
    - layer: its number, for reports of a ring that hangs.

    Returns out [B, S, Hq, Dv] in q's dtype; queries that see nothing get 0. With return_lse, returns (out, lse), both
    differentiable: lse, fp32 [B, Hq, S], is the natural log-sum-exp of the scores and the sink, -inf for queries that
    see nothing. `merge` combines such pairs, as Partials.

    Raises ValueError or TypeError naming the argument that does not fit, or the reason why no kernel supports it, and
    NotImplementedError for second derivatives (create_graph=True) and torch.func's transforms.
    """
    check_call(
        q, k, v, plan, scale, softcap, sink,
        deterministic=deterministic, compensated=compensated, return_lse=return_lse,
    )  # fmt: skip
    if not len(q):  # no batch rows on any rank: nothing to compute or send
        out = like_out(q, v) + 0 * sum(x.sum().to(q.dtype) for x in (k, v, sink) if x is not None)
        return (out, out.float().sum(-1).transpose(1, 2)) if return_lse else out
    centers_keys = compensated and softcap is None and sink is None and not return_lse
    shared = Layer(
        plan=plan,
        kernel=kernels.select(q, k, softcap, kernel, deterministic, v.shape[3]),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        centers_keys=centers_keys,
        keeps_residue=compensated and q.dtype != torch.float32 and not centers_keys,
        returns_lse=return_lse,
        name="attention" if layer is None else f"layer {layer}",
    )
    with torch.autocast(q.device.type, enabled=False):  # fp32 tensors must stay fp32 here
        return _RingAttention.apply(q, k, v, sink, shared)


@overload
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, *,
    return_lse: Literal[False] = False, **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, *,
    return_lse: Literal[True], **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@torch.compiler.disable(reason="its plan is made on the host")
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    kernel: str = "auto",
    deterministic: bool = False,
    compensated: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention on one device, ring_attention on a ring of one, with its other arguments, results and errors.

    - q [B, S, Hq, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv]: as in ring_attention, whole sequences.
    - mask: an IntervalMask of S queries and S keys, with one batch row or B.
    """
    check_tensors(q=q, k=k, v=v)
    check_mask(mask)
    if q.dim() == k.dim() == 4 and (q.shape[1], k.shape[1]) != (mask.queries, mask.keys):
        raise ValueError(
            f"a mask of {mask.queries} x {mask.keys} does not fit {q.shape[1]} queries and {k.shape[1]} keys"
        )
    plan = AttentionPlan(mask, Layout.contiguous(mask.queries, 1), Loopback(1, q.device))
    return ring_attention(  # type: ignore[call-overload]
        q, k, v, plan, scale=scale, softcap=softcap, sink=sink, kernel=kernel,
        deterministic=deterministic, compensated=compensated, return_lse=return_lse,
    )  # fmt: skip


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, layer: Layer):
        kv_heads, label = k.shape[2], Label(layer.name, "forward")
        ring, ulysses = layer.plan.ring, layer.plan.ulysses
        if ulysses is not None:
            q = ulysses.queries(q, label.at("exchange of queries"))
            k = ulysses.keys(k, label.at("exchange of keys"))
            v = ulysses.keys(v, label.at("exchange of values"))
        results = recompute.kept(travels=ring.size > 1 or ulysses is not None)
        if results is None:
            schedule, _ = layer.schedules(q, k, v)
            own_sink = None if sink is None else layer.own_sink(sink)
            keeps_residue = layer.keeps_residue and any(ctx.needs_input_grad)
            with ring.receive_buffers(label) as allocate:
                workers = [
                    Forward(layer, schedule, i, tensors, own_sink, keeps_residue, Memory.of(schedule, allocate))
                    for i, tensors in enumerate(_by_rank(q, k, v, ranks=len(ring.local)))
                ]
                run(schedule, workers, ring, label)
            out, *kept = (concatenate(list(parts)) for parts in zip(*(x.results for x in workers), strict=True))
            if ulysses is not None:
                out = ulysses.tokens(out, label.at("exchange of results"))
            results = recompute.keep(out, *kept)
        out, lse = results[:2]
        if layer.returns_lse and ulysses is not None:
            lse = ulysses.tokens(lse.transpose(1, 2), label.at("exchange of lse")).transpose(1, 2).contiguous()
        returned = (out, lse) if layer.returns_lse else (out,)
        ctx.save_for_backward(q, k, v, sink, *returned[1:], *results)
        ctx.layer, ctx.kv_heads = layer, kv_heads
        ctx.set_materialize_grads(False)
        return returned if layer.returns_lse else out

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None = None):
        # torch's once_differentiable would return a gradient without a graph if dout has none: a silent 0 later.
        if torch.is_grad_enabled():
            raise NotImplementedError("ring_attention has no second derivative: create_graph=True cannot be used on it")
        with torch.autocast(ctx.layer.plan.ring.device.type, enabled=False):
            return *_gradients(ctx, dout, dlse), None


def _gradients(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v and the sink.

    The derivative of lse_i is p_ij, so that of a score is p_ij (dp_ij - delta_i + dlse_i): dlse is part of delta.
    """
    q, k, v, sink, *saved = ctx.saved_tensors
    returned, (out, lse, *residue) = (saved[:1], saved[1:]) if ctx.layer.returns_lse else ([], saved)
    del saved
    layer, label = ctx.layer, Label(ctx.layer.name, "backward")
    ring, ulysses = layer.plan.ring, layer.plan.ulysses
    dout = torch.zeros_like(out) if dout is None else dout if dout.stride(-1) == 1 else dout.contiguous()
    delta = layer.kernel.delta(out, dout)
    if dlse is not None:  # rows that see nothing have no softmax, and may get a NaN
        delta -= dlse.masked_fill(returned[0] == -torch.inf, 0.0)
    del out  # of a recomputed layer, only this function holds it: its memory is freed before gradients are allocated
    exact = torch.float32 if ulysses is not None else q.dtype  # Ulysses sums gradients over its ranks
    dq, dk, dv = (torch.empty(x.shape, dtype=exact, device=x.device) for x in (q, k, v))
    dsink = None if sink is None else torch.zeros_like(sink)
    groups = [(slice(None), slice(None))]
    if ring.size == 1 and ulysses is None:
        groups = _head_groups(q, k, () if layer.plan.writes_gradients(q.dtype) else (k, v))
    for of_q, of_k in groups:
        by_query, by_key = (q, dout, *residue, dq), (k, v, dk, dv)
        q_, dout_, *residue_, dq_ = (x[:, :, of_q] for x in by_query)
        k_, v_, dk_, dv_ = (x[:, :, of_k] for x in by_key)
        _, schedule = layer.schedules(q_, k_, v_)
        saved = _by_rank(q_, k_, v_, lse[:, of_q], delta[:, of_q], dout_, *residue_, ranks=len(ring.local))
        results = _by_rank(dq_, dk_, dv_, ranks=len(ring.local))
        with ring.receive_buffers(label) as allocate:
            workers = [
                Backward(layer, schedule, i, Saved(*tensors), into, label, Memory.of(schedule, allocate))
                for i, (tensors, into) in enumerate(zip(saved, results, strict=True))
            ]
            run(schedule, workers, ring, label)
        if sink is not None and dsink is not None:
            of_queries = concatenate([x.sink_gradient(layer.own_sink(sink)[of_q]) for x in workers])
            layer.own_sink(dsink)[of_q].copy_(-of_queries.sum((0, 2)))
        del workers  # and their fp32 gradients, before those of the next group
    if ulysses is not None:
        dq = ulysses.tokens(dq.to(q.dtype), label.at("exchange of queries' gradients"))
        dk = ulysses.key_gradients(dk, ctx.kv_heads, label.at("exchange of keys' gradients"))
        dv = ulysses.key_gradients(dv, ctx.kv_heads, label.at("exchange of values' gradients"))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsink


def _head_groups(q: Tensor, k: Tensor, added_to: tuple[Tensor, ...]) -> list[tuple[slice, slice]]:
    """Groups of (query heads, KV heads) whose fp32 gradients take at most GROUP_BYTES, or that have one KV head.

    added_to: which of k and v have fp32 gradients, beside q. A ring of one computes the backward group by group: fp32
    dq of all heads is 8 GiB for a million tokens of 16 query heads of 128.
    """
    kv_heads, queries_per_key = k.shape[2], q.shape[2] // k.shape[2]
    of_all = 4 * sum(x.numel() for x in (q, *added_to))
    groups = next((n for n in range(1, kv_heads) if kv_heads % n == 0 and of_all <= n * GROUP_BYTES), kv_heads)
    width = kv_heads // groups
    return [
        (slice(first * queries_per_key, (first + width) * queries_per_key), slice(first, first + width))
        for first in range(0, kv_heads, width)
    ]


def _by_rank(*tensors: Tensor, ranks: int) -> list[tuple[Tensor, ...]]:
    """Each local rank's part of the tensors, as views; ranks are outermost in the batch."""
    return list(zip(*(x.chunk(ranks) for x in tensors), strict=True))
