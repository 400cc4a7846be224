"""The definition of attention, with the whole score matrix, in the dtype of its inputs: float64 is the reference."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, Hq, D] and lse [B, Hq, Sq], differentiable; queries that see nothing give 0 and -inf.

    q [B, Sq, Hq, D]; k, v [B, Sk, Hkv, D]; visible [B|1, Sq, Sk]. sink [Hq] is one more score of every query, behind
    the softcap, whose value is 0.
    """
    k, v = (x.transpose(1, 2).repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible.to(q.device)[:, None], -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    hidden = scores == -torch.inf
    weights = torch.softmax(scores.masked_fill(hidden.all(-1, keepdim=True), 0.0), dim=-1).masked_fill(hidden, 0.0)
    return (weights[..., : k.shape[2]] @ v).transpose(1, 2), scores.logsumexp(-1)
