"""flash_decode: a few new queries attend to a KV cache. The ring's decoding shares `parts` and `combine`.

A cache is a tensor [B, capacity, Hkv, D] that is allocated once; each query sees its rows start:end. On a GPU, and in
Triton's interpreter, `portable_decode` runs: one program per split of the keys, then one combination. Elsewhere, the
plain torch below runs, which is also the definition: one run of keys at a time, with a carried state.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ringflash.intervals import Intervals
from ringflash.kernels import blocked, imported
from ringflash.kernels.checks import check_spans, check_tensors, like_out, number_refusal, request_refusal
from ringflash.partial import Partial, merge, merge_sink

RUN = 8192  # keys of one run in plain torch, which copies them in fp32
KERNELS = ("portable", "blocked")
Span = tuple[Tensor, Tensor]


def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    end: Tensor,
    *,
    start: Tensor | None = None,
    leading: Span | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention of new queries over a KV cache, without gradients: query i of row b sees keys start[b, i]:end[b, i].

    - q [B, Sq, Hq, D]: the new tokens' queries, often Sq = 1, in fp16, bf16 or fp32. Hq is a multiple of Hkv.
    - k_cache [B, capacity, Hkv, D], v_cache [B, capacity, Hkv, Dv]: in q's dtype. The new tokens' own keys and values
      must already be there. Rows before a batch row's first start or from its last end on may hold anything: a cache
      need not be cleared. D and Dv are 32 to 512 in steps of 8 on a GPU, and any size in plain torch. The last
      dimension is contiguous, and other strides are free.
    - end, start: int32 [B, Sq] or [1, Sq] on the cache's device, which alone reads them. No call synchronises with the
      host, so calls can be captured as a CUDA graph. Neither decreases along a row. start is 0 by default; a window's
      start is end - window, and in a packed prompt it is where the document starts. On the CPU, bounds outside
      0..capacity are an error; on a GPU they are clamped.
    - leading: another (start, end) that shares no key with the first, such as the leading tokens that windows also see.
    - scale: above 0; by default D ** -0.5.
    - softcap: scores become softcap * tanh(scores / softcap); None for no cap.
    - sink [Hq]: a logit per head that has no value (gpt-oss), not capped.
    - kernel: portable (Triton), blocked (plain torch), or auto, the first that supports the request.

    Returns out [B, Sq, Hq, Dv] in q's dtype; a query that sees nothing gets 0. Raises TypeError or ValueError naming
    the argument that does not fit, and RuntimeError if an input requires a gradient.

    >>> q, cache, end = torch.randn(2, 1, 4, 64), torch.randn(2, 100, 2, 64), torch.tensor([[40], [7]]).int()
    >>> flash_decode(q, cache, cache, end).shape
    torch.Size([2, 1, 4, 64])
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    if reason := request_refusal(q, k_cache, softcap):
        raise ValueError(f"flash_decode {reason}")
    _check_shapes(q, k_cache, v_cache, sink)
    if scale is not None and (reason := number_refusal(scale)):
        raise ValueError(f"scale must be None for head_dim ** -0.5, or {reason}")
    if start is None and isinstance(end, Tensor):
        start = torch.zeros_like(end, dtype=torch.int32)
    spans: dict[str, Any] = {"": (start, end)}
    if leading is not None:
        spans["leading"] = leading
    check_spans(q, k_cache, spans)
    found = parts(
        q, k_cache, v_cache, tuple(spans.values()),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap), kernel=kernel,
    )  # fmt: skip
    return combine(found, sink=sink, out_dtype=q.dtype).out


def parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: tuple[Span, ...],
    *,
    scale: float,
    softcap: float | None = None,
    kernel: str = "auto",
) -> Partial:
    """Parts of attention over the union of spans, which share no key: out [N, B, Sq, Hq, Dv] and lse [N, B, Hq, Sq].

    Both are fp32. The kernel chooses N, and `combine` combines the parts. A part of a row that has seen nothing has lse
    -inf, and its out may hold anything. Arguments are those of `flash_decode`, which checks them. Raises ValueError
    with the reason if no kernel supports the request.
    """
    module = _select(q, k, softcap, kernel, v.shape[-1])
    if module is not None and 0 not in q.shape and 0 not in k.shape:
        return module.decode(q, k, v, spans, scale=scale, softcap=softcap)
    state = Partial.identity(like_out(q, v))
    for start, end in spans:
        for first in range(int(start.min()), int(end.max()), RUN) if start.numel() else ():
            k_run, v_run = (x[:, first : first + RUN] for x in (k, v))
            within = Intervals.of_queries(*((bound - first).clamp(0, k_run.shape[1]) for bound in (start, end)))
            j = torch.arange(k_run.shape[1], device=q.device)
            unseen = (j < within.start[:, :1]) | (j >= within.end[:, -1:])  # may hold NaN, and 0 x NaN is NaN
            v_run = v_run.masked_fill(unseen[..., None, None], 0.0)
            blocked.forward(q, k_run, v_run, within, scale=scale, softcap=softcap, carry=state)
    return Partial(state.out[None], state.lse[None])


def combine(parts: Partial, *, sink: Tensor | None = None, out_dtype: torch.dtype = torch.float32) -> Partial:
    """Attention over the keys of all parts and the sink [Hq]: `partial.merge` of N Partials at once.

    parts: out [N, B, Sq, Hq, Dv] and lse [N, B, Hq, Sq], fp32; the last dimension of out is contiguous. They are splits
    of a cache, or results of ranks that hold a part of it each. Returns out in out_dtype, and lse.
    """
    module = imported("portable_decode")
    if isinstance(module, ModuleType) and module.runs_on(parts.out.device) and parts.out.numel():
        return module.combine(parts, sink, out_dtype)
    hidden = (parts.lse == -torch.inf).transpose(2, 3).unsqueeze(-1)
    clean = parts.out.masked_fill(hidden, 0.0)
    found = functools.reduce(merge, map(Partial, clean, parts.lse))
    if sink is not None:
        found = Partial(found.out.clone(), found.lse.clone())
        merge_sink(found, sink)
    return Partial(found.out.to(out_dtype), found.lse)


def _select(q: Tensor, k: Tensor, softcap: float | None, kernel: str, value_dim: int) -> ModuleType | None:
    """The Triton kernel's module, or None for plain torch. Raises ValueError if the named kernel refuses."""
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel={kernel} is not one of auto, {', '.join(KERNELS)}")
    if kernel == "blocked":
        return None
    module = imported("portable_decode")
    reason = module if isinstance(module, str) else module.supports(q, k, softcap, value_dim)
    if reason is None and isinstance(module, ModuleType):
        return module
    if kernel == "portable":
        raise ValueError(f"kernel=portable {reason}")
    return None


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> None:
    """Raise unless keys and values belong to one cache, and the sink has one logit per query head."""
    if v.dim() != 4 or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3] or 0 in (q.shape[3], v.shape[3]):
        shapes = f"q {[*q.shape]}, k_cache {[*k.shape]}, v_cache {[*v.shape]}"
        raise ValueError(
            f"q must be [B, Sq, Hq, D], k_cache [B, capacity, Hkv, D] and v_cache [B, capacity, Hkv, Dv], got {shapes}"
        )
    for name, x in (("q", q), ("k_cache", k), ("v_cache", v)):
        if x.stride(3) != 1:
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {x.stride()}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires a gradient, which flash_decode does not compute: call it under torch.no_grad(), or "
                f"use flash_attention"
            )
    if sink is not None and (not isinstance(sink, Tensor) or sink.shape != q.shape[2:3] or sink.device != q.device):
        found = f"{[*sink.shape]} on {sink.device}" if isinstance(sink, Tensor) else type(sink).__name__
        raise ValueError(f"sink must be [{q.shape[2]}], a logit of each query head, on {q.device}, got {found}")
