"""ring_attention: exact attention over a sequence sharded across ranks.

Forward. Keys and values travel round the ring; the queries stay, with their running (out, lse), which each hop's
kernel carries in and updates. While hop s is computed, the keys of hop s + 1 are on their way:

    rank r      compute   | own keys      | keys of r - 1 | keys of r - 2 | ...
                transfer  | keys of r - 1 | keys of r - 2 | keys of r - 3 | ...

Backward. delta = rowsum(dout * out) and the global lse make each block's gradient independent of the others. Keys and
values go round again; their gradients follow in fp32, one hop behind, added to by each rank's kernel, and are home
after the last hop. They travel in two halves of the KV heads, so that one half is on its way while the kernel adds to
the other:

    rank r      compute   | hop s, half 0          | hop s, half 1              | hop s + 1, half 0 ...
                transfer  | dk, dv of half 1, s-1  | dk, dv of half 0, s        | dk, dv of half 1, s ...

Extra memory is two shards of keys and values, and in the backward two of their gradients, whatever the ring's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringflash import kernels
from ringflash.layout import Layout
from ringflash.mask import IntervalMask
from ringflash.partial import Partial
from ringflash.ring.plan import AttentionPlan
from ringflash.ring.transport import Loopback, Transfer


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention of this rank's queries over the whole sequence, differentiable.

    q [B, S, Hq, D]; k, v [B, S, Hkv, D], where S is the layout's shard length and Hq a multiple of Hkv; fp16, bf16 or
    fp32; any strides with a contiguous last dimension. With a Loopback ring, B is ranks x batch, ranks outermost.
    scale defaults to D ** -0.5. Returns out [B, S, Hq, D] in q's dtype; queries that see nothing get 0.
    Raises ValueError or TypeError naming the argument that does not fit, or the reason why no kernel takes it.
    """
    _check(q, k, v, plan, softcap)
    call = _Call(
        plan=plan,
        kernel=kernels.select(q, k, softcap, kernel),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
    )
    return _RingAttention.apply(q, k, v, call)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention on one device under any IntervalMask: ring_attention on a ring of one. Same arguments and errors."""
    plan = AttentionPlan(mask, Layout.contiguous(mask.queries, 1), Loopback(1, q.device))
    return ring_attention(q, k, v, plan, scale=scale, softcap=softcap, kernel=kernel)


@dataclass(frozen=True, eq=False)
class _Call:
    """What a layer's forward and backward share besides tensors."""

    plan: AttentionPlan
    kernel: kernels.Kernel
    scale: float
    softcap: float | None


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
        ranks = len(call.plan.ring.local)
        parts = _forward(_by_rank(q, ranks), _by_rank(k, ranks), _by_rank(v, ranks), call)
        out, lse = (torch.cat(x) if ranks > 1 else x[0] for x in zip(*((p.out, p.lse) for p in parts), strict=True))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        ranks = len(ctx.call.plan.ring.local)
        # rowsum over D, fp32, as [B, Hq, S]
        delta = (dout.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
        if dout.stride(-1) != 1:
            dout = dout.contiguous()
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        dk, dv = _backward(*(_by_rank(x, ranks) for x in (dout, q, k, v, lse, delta, dq)), ctx.call)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _forward(q: list[Tensor], k: list[Tensor], v: list[Tensor], call: _Call) -> list[Partial]:
    """The Partial over all keys for each local rank, out in q's dtype."""
    ring, hops = call.plan.ring, call.plan.hops
    state: list[Partial | None] = [None] * len(ring.local)
    last = [call.plan.computed(i)[-1] for i in range(len(ring.local))]
    kv = _Rotation(ring, _packed(k, v, ring.size))
    for s in range(ring.size):
        if s + 1 < ring.size:
            kv.start()
        for i, hop in enumerate(hops[s]):
            if hop.intervals is not None:
                k_hop, v_hop = kv.here[i]
                out_dtype = q[i].dtype if s == last[i] else torch.float32
                state[i] = call.kernel.forward(
                    q[i], k_hop, v_hop, hop.intervals,
                    scale=call.scale, softcap=call.softcap, carry=state[i], out_dtype=out_dtype,
                )  # fmt: skip
        kv.finish()
    return state  # type: ignore[return-value]  # hop 0 is always computed


def _backward(
    dout: list[Tensor], q: list[Tensor], k: list[Tensor], v: list[Tensor],
    lse: list[Tensor], delta: list[Tensor], dq: list[Tensor], call: _Call,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Adds to dq and returns dk, dv, fp32, for all local ranks."""
    ring, hops = call.plan.ring, call.plan.hops
    halves = _halves(q[0].shape[2], k[0].shape[2], ring.size)
    kv = _Rotation(ring, _packed(k, v, ring.size))
    dkv = [_Rotation(ring, [_gradients(x[:, :, heads]) for x in k]) for _, heads in halves]
    for s in range(ring.size):
        if s + 1 < ring.size:
            kv.start()
        for travelling, (query_heads, heads) in zip(dkv, halves, strict=True):
            travelling.finish()
            for i, hop in enumerate(hops[s]):
                if hop.intervals is not None:
                    k_hop, v_hop = kv.here[i]
                    dk_hop, dv_hop = travelling.here[i]
                    call.kernel.backward(
                        dout[i][:, :, query_heads], q[i][:, :, query_heads], k_hop[:, :, heads], v_hop[:, :, heads],
                        lse[i][:, query_heads], delta[i][:, query_heads], hop.intervals,
                        scale=call.scale, softcap=call.softcap, dq=dq[i][:, :, query_heads], dk=dk_hop, dv=dv_hop,
                    )  # fmt: skip
            if ring.size > 1:
                travelling.start()
        kv.finish()
    for travelling in dkv:
        travelling.finish()
    # [ranks * B, S, Hkv, D] from each half's [2, B, S, heads, D] of each rank
    home = torch.cat([torch.cat(travelling.here, dim=1) for travelling in dkv], dim=3)
    return home[0], home[1]


class _Rotation:
    """Buffers that go round the ring: `here` is what can be used now, and a second set receives what comes next."""

    def __init__(self, ring, buffers: list) -> None:
        self.ring = ring
        self.here = buffers
        self._next = [torch.empty_like(x) for x in buffers] if ring.size > 1 else []
        self._transfer: Transfer | None = None

    def start(self) -> None:
        """Pass `here` on to the next rank; it may be read, not written, until `finish`."""
        self._transfer = self.ring.rotate(self.here, self._next)

    def finish(self) -> None:
        """Take what arrived, if anything was started."""
        if self._transfer is not None:
            self._transfer.wait()
            self.here, self._next, self._transfer = self._next, self.here, None


def _by_rank(x: Tensor, ranks: int) -> list[Tensor]:
    """The local ranks' parts of a batch, as views."""
    return list(x.chunk(ranks)) if ranks > 1 else [x]


def _packed(k: list[Tensor], v: list[Tensor], size: int) -> list:
    """k and v of each rank as one contiguous [2, B, S, Hkv, D] that can be sent; alone, as they are."""
    pairs = list(zip(k, v, strict=True))
    return [torch.stack(pair) for pair in pairs] if size > 1 else pairs


def _gradients(k: Tensor) -> Tensor:
    return torch.zeros(2, *k.shape, dtype=torch.float32, device=k.device)


def _halves(query_heads: int, heads: int, size: int) -> list[tuple[slice, slice]]:
    """(query heads, KV heads) of each half; one part where nothing travels or there is one KV head."""
    group, middle = query_heads // heads, heads // 2
    parts = [slice(0, middle), slice(middle, heads)] if size > 1 and heads > 1 else [slice(0, heads)]
    return [(slice(part.start * group, part.stop * group), part) for part in parts]


def _check(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, softcap: float | None) -> None:
    """Refuse what does not fit, with the values."""
    shapes = f"q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"q must be [B, S, Hq, D] and k, v alike [B, S, Hkv, D], got {shapes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must agree on batch, length and head size, got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide among {k.shape[2]} KV heads")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {q.dtype}")
    if not q.device == k.device == v.device or q.device.type != plan.ring.device.type:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}, the plan on {plan.ring.device}")
    if q.shape[1] != plan.layout.shard_length:
        raise ValueError(f"the plan's shards hold {plan.layout.shard_length} tokens, got {shapes}")
    if len(q) % len(plan.ring.local) or plan.mask.batch not in (1, len(q) // len(plan.ring.local)):
        raise ValueError(
            f"a mask of {plan.mask.batch} batch rows and {len(plan.ring.local)} local ranks do not fit {shapes}"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, or None for no cap, got {softcap}")
