"""The kernel in plain torch, tile by tile, on any device. The CPU uses it, and it is the readable definition.

Each tile of queries is multiplied by the run of keys that any of its rows sees, so no [Sq, Skv] matrix is ever
materialised. With scores s = softcap(scale q k^T) and a carried (out, lse),

  forward   lse' = log(exp(lse) + sum_j exp(s_j))    out' = exp(lse - lse') out + sum_j exp(s_j - lse') v_j
  backward  p = exp(s - lse)    ds = p (dout v^T - delta)   dq += scale ds k   dk += scale ds^T q  dv += p^T dout

where ds is also multiplied by the softcap's derivative, 1 - tanh^2. Query heads that share a KV head are rows of one
matrix product, so k and v are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ringflash.intervals import Intervals
from ringflash.kernels.checks import check_seen, like_out, request_refusal
from ringflash.kernels.compensation import center
from ringflash.partial import Partial, merge

__all__ = ["backward", "center", "delta", "forward", "round_dq", "round_into", "supports"]

# Rows of a query tile. Larger tiles feed the matrix products better, smaller ones waste less on masked corners.
TILE = 256


def supports(q: Tensor, k: Tensor, softcap: float | None, value_dim: int | None = None) -> str | None:
    """None, or the reason for refusing. Any floating dtype, head size and device is supported."""
    if not q.is_floating_point():
        return f"needs floating point, got {q.dtype}"
    return request_refusal(q, k, softcap)


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
    """Attention over ``start:end`` of k and v, merged with carry. See `ringflash.kernels` for the contract."""
    check_seen("blocked", q, seen)
    state = Partial.identity(like_out(q, v)) if carry is None else carry
    for rows, keys, visible in _tiles(intervals):
        scores, _ = _scores(_fold(q[:, rows], k), _keys(k, keys), scale, softcap)
        scores = scores.masked_fill(~_per_group(visible, q, k), float("-inf"))
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1))
        block = Partial(_unfold(weights @ _keys(v, keys), q), lse.reshape(len(q), q.shape[2], -1))
        merged = merge(Partial(state.out[:, rows], state.lse[:, :, rows]), block)
        state.out[:, rows] = merged.out
        state.lse[:, :, rows] = merged.lse
    if out is None:
        return state
    if seen is None:
        return Partial(out.copy_(state.out), state.lse)
    complete = (seen[1].diff(dim=1) == 0)[..., None, None]
    out.copy_(torch.where(complete, state.out, out))
    return state


def delta(out: Tensor, dout: Tensor) -> Tensor:
    """rowsum(out * dout) of [B, S, H, D], as fp32 [B, H, S]."""
    return (out.float() * dout.float()).sum(-1).transpose(1, 2).contiguous()


def round_dq(out: Tensor, dq: Tensor, *, scale: float) -> None:
    """out = dq, both [B, S, H, D], rounded to its dtype: this kernel sums up the gradient itself."""
    round_into(out, dq)


def round_into(out: Tensor, x: Tensor) -> None:
    """out = x, rounded to its dtype."""
    out.copy_(x)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    intervals: Intervals,
    *,
    scale: float,
    softcap: float | None = None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    center: Tensor | None = None,
    calls: int = 1,
) -> None:
    """Add this block's gradients to dq, dk and dv, or write dk and dv. See `ringflash.kernels` for the contract."""
    k = k if center is None else k - center
    results, written = (dk, dv), dk.dtype != torch.float32
    if written:  # query tiles add to the same keys
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in results)
    for rows, keys, visible in _tiles(intervals):
        q_tile, dout_tile = _fold(q[:, rows], k), _fold(dout[:, rows], k)
        lse_tile, delta_tile = (x[:, :, rows].reshape(len(q), k.shape[2], -1, 1) for x in (lse, delta))
        scores, slope = _scores(q_tile, _keys(k, keys), scale, softcap)
        p = torch.exp(scores - lse_tile).masked_fill(~_per_group(visible, q, k), 0.0)
        ds = p * (dout_tile @ _keys(v, keys).transpose(-1, -2) - delta_tile) * (slope * scale)
        dq[:, rows] += _unfold(ds @ _keys(k, keys), q)
        dk[:, keys] += (ds.transpose(-1, -2) @ q_tile).transpose(1, 2)
        dv[:, keys] += (p.transpose(-1, -2) @ dout_tile).transpose(1, 2)
    if written:
        for result, x in zip(results, (dk, dv), strict=True):
            round_into(result, x)


def _tiles(intervals: Intervals) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, keys, visible [B|1, rows, keys]) of every tile that sees anything."""
    start, end = intervals.start, intervals.end
    for first in range(0, start.shape[1], TILE):
        rows = slice(first, min(first + TILE, start.shape[1]))
        lo, hi = start[:, rows], end[:, rows]
        keys = slice(int(lo[:, 0].min()), int(hi[:, -1].max()))
        if keys.start < keys.stop:
            j = torch.arange(keys.start, keys.stop, device=start.device)
            yield rows, keys, (lo[..., None] <= j) & (j < hi[..., None])


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """Query-shaped [B, rows, Hq, D] to fp32 [B, Hkv, group * rows, D]: the rows of one KV head's products."""
    batch, rows, heads, dim = x.shape
    return x.transpose(1, 2).reshape(batch, k.shape[2], heads // k.shape[2] * rows, dim).float()


def _unfold(x: Tensor, q: Tensor) -> Tensor:
    """The inverse of _fold: [B, Hkv, group * rows, D] to [B, rows, Hq, D]."""
    batch, _, heads, _ = q.shape
    return x.reshape(batch, heads, -1, x.shape[-1]).transpose(1, 2)


def _keys(x: Tensor, keys: slice) -> Tensor:
    return x[:, keys].transpose(1, 2).float()


def _per_group(visible: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """visible [B|1, rows, keys] for each query head of a group: [B|1, 1, group * rows, keys]."""
    return visible.repeat(1, q.shape[2] // k.shape[2], 1).unsqueeze(1)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """Capped scores, and the derivative of the cap."""
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is None:
        return scores, 1.0
    x = scores / softcap
    return softcap * torch.tanh(x), torch.cosh(x).pow(-2)  # 1 - tanh^2 would cancel where tanh is near 1
