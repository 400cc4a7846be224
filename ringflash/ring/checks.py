"""Checks of ring_attention's arguments. Errors name the value, and are raised before any rank waits for another."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.kernels.checks import check_tensors, number_refusal
from ringflash.ring.plan import AttentionPlan
from ringflash.ring.ulysses import heads_refusal


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float | None,
    softcap: float | None,
    sink: Tensor | None,
    **switches: bool,
) -> None:
    """Raise ValueError or TypeError, with the values, if the arguments of ring_attention do not fit.

    Raise NotImplementedError under torch.func's transforms, which ring_attention does not support.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "ring_attention cannot be transformed by torch.func (vmap, grad, jacrev, jvp): give it more batch rows "
            "instead of vmap, and take gradients by torch.autograd.grad or backward()"
        )
    check_tensors(q=q, k=k, v=v)
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"plan must be an AttentionPlan of mask, layout and ring, got {plan!r:.100}")
    _check_shapes(q, k, v, plan)
    for name, value, default in (("scale", scale, "for head_dim ** -0.5"), ("softcap", softcap, "for no cap")):
        if value is not None and (reason := number_refusal(value)):
            raise ValueError(f"{name} must be None {default}, or {reason}")
    if sink is not None:
        _check_sink(sink, q)
    for name, on in switches.items():
        if not isinstance(on, bool):
            raise TypeError(f"{name} must be True or False, got {on!r:.100}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    """Raise ValueError unless q, k and v fit each other and the plan."""
    shapes = f"q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q must be [B, S, Hq, D], k [B, S, Hkv, D] and v [B, S, Hkv, Dv], got {shapes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must agree on batch, length and head size, got {shapes}")
    if 0 in (q.shape[2], k.shape[2], q.shape[3], v.shape[3]):
        raise ValueError(f"query heads, KV heads and head size must be 1 or more, got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide among {k.shape[2]} KV heads")
    if q.device.type != plan.ring.device.type:
        raise ValueError(f"q, k and v are on {q.device}, the plan on {plan.ring.device}")
    if q.shape[1] != plan.token_layout.shard_length:
        raise ValueError(f"the plan's shards hold {plan.token_layout.shard_length} tokens, got {shapes}")
    if plan.ulysses is not None and (reason := heads_refusal(plan.ulysses.size, q.shape[2], k.shape[2])):
        raise ValueError(reason)
    ranks = len(plan.ring.local)
    if len(q) % ranks or plan.batch not in (1, len(q) // ranks):
        rows = plan.batch if plan.batch > 1 else "B"
        raise ValueError(f"the batch must be {ranks} local ranks x {rows} rows, ranks outermost, got {shapes}")


def _check_sink(sink: Tensor, q: Tensor) -> None:
    """Raise unless the sink has one floating-point logit per query head, on the queries' device."""
    if not isinstance(sink, Tensor) or not sink.is_floating_point():
        what = sink.dtype if isinstance(sink, Tensor) else type(sink).__name__
        raise TypeError(f"sink must be a floating-point tensor of a logit for each query head, got {what}")
    if sink.shape != q.shape[2:3]:
        raise ValueError(f"sink must hold a logit for each of {q.shape[2]} heads, got {[*sink.shape]}")
    if sink.device != q.device:
        raise ValueError(f"sink must be on {q.device}, as q is, got {sink.device}")
