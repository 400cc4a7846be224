"""What no kernel takes, whatever it is written in: refused before a kernel's own code is imported or run."""

from __future__ import annotations

from numbers import Real

from torch import Tensor

# Kernels compute in fp32: between these, a scale, a softcap and their quotient neither overflow nor become 0.
LEAST, MOST = 1e-15, 1e15


def number_refusal(value: object) -> str | None:
    """None, or what a scale or a softcap must be instead of `value`."""
    if isinstance(value, Real) and not isinstance(value, bool) and LEAST <= value <= MOST:  # type: ignore[operator]
        return None
    return f"a number above 0, finite in fp32 ({LEAST:g} to {MOST:g}), got {value!r:.60}"


def request_refusal(q: Tensor, k: Tensor, softcap: float | None) -> str | None:
    """None, or why no kernel takes these: the tail of "kernel=NAME ..."."""
    if q.dim() != 4 or k.dim() != 4:
        return f"takes q and k as [B, S, H, D], got {[*q.shape]} and {[*k.shape]}"
    if q.shape[0] != k.shape[0] or q.device != k.device:
        return f"takes q and k of one batch on one device, got {len(q)} and {len(k)} on {q.device} and {k.device}"
    if not k.shape[2] or not q.shape[2] or q.shape[2] % k.shape[2]:
        return f"takes query heads a multiple of KV heads, 1 or more of each, got {q.shape[2]} and {k.shape[2]}"
    if softcap is not None and (reason := number_refusal(softcap)):
        return f"takes as softcap {reason}"
    return None
