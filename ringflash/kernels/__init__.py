"""Attention of one query shard on one key/value shard, on one device.

Every kernel has the same six functions. None of them depends on rings, layouts, documents or windows:

    forward(q, k, v, intervals, *, scale, softcap, carry, out, seen) -> Partial
    delta(out, dout) -> Tensor
    center(q, k, lse, *, scale) -> (Tensor, Tensor)
    backward(dout, q, k, v, lse, delta, intervals, *, scale, softcap, dq, dk, dv, center, calls) -> None
    round_into(out, x) -> None
    round_dq(out, dq, *, scale) -> None

q [B, Sq, Hq, D]; k [B, Skv, Hkv, D]; v [B, Skv, Hkv, Dv]; dout [B, Sq, Hq, Dv]. The last dimension is contiguous, and
other strides are free. Hq is a multiple of Hkv. In the Hopper kernels, Dv is D.
Scores are ``scale * q k^T`` with scale > 0. With a softcap, they become ``softcap * tanh(scores / softcap)``. Keys and
values that no query sees must also be finite: tiles extend beyond an interval's edge, and 0 x NaN is NaN.

forward: `carry` is the Partial of the keys of earlier calls; it is updated in place and returned. Without a carry, the
Partial is new and in fp32. `out` [B, Sq, Hq, Dv], in q's dtype or fp32, is written instead of carry.out, as a whole;
lse is still updated in place. `seen` is this call's entry of `mask.rows_seen`, for one of several calls that carry
an fp32 Partial. It needs `out`. The last call that sees a tile of rows writes it to `out` and not to the Partial, and
earlier calls write it to the Partial alone. After the last call, `out` is complete. One kernel must run all the calls.

backward: lse and delta, fp32 [B, Hq, Sq], belong to the whole softmax over all shards: delta = rowsum(dout * out).
Gradients are *added* to dq, dk and dv, which are fp32, have the shapes of q, k and v, and a contiguous last dimension.
If one call has all queries of its keys, dk and dv may instead have the dtype of 16-bit inputs. They are then *written*,
all rows, with 0 where no query sees a key.
With `center` [B, 1, Hkv, D], the keys are k - center, and lse is the lse of those keys. The function center computes
both; `compensation` explains why. `calls`: how many calls run on the device at the same time, this one and those of
other heads with the same intervals. Together they keep it busy, so that a kernel need not divide its work as finely.

round_into writes a complete sum of dk or dv in the dtype of `out`. A kernel may sum dq in another form: Hopper's
columns are in another order from head_dim 128 on, and at 128 the scale is left out. round_dq turns this sum into the
gradient [B, Sq, Hq, D]. So one kernel must run all the calls that add to dq, which begins as zeros.

    blocked             plain torch: the CPU's kernel, and the readable definition
    portable_*          Triton, sm_80 and newer
    hopper_*            Gluon, sm_90: each head size has its own warps; hopper_cluster has clusters of two
    gluon_names         one name each for functions that Triton's versions name differently
    decode              flash_decode: a few queries over a long cache
    compensation        how gradients are protected from the rounding of out
    checks              what every kernel refuses, in its own name
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

FASTEST_FIRST = ("hopper", "portable", "blocked")


@dataclass(frozen=True)
class Kernel:
    """The functions above, and `supports(q, k, softcap, value_dim)`: None, or the reason for refusing a request."""

    name: str
    forward: Callable
    delta: Callable[[Tensor, Tensor], Tensor]
    center: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable
    round_into: Callable[[Tensor, Tensor], None]
    round_dq: Callable[..., None]
    supports: Callable[[Tensor, Tensor, float | None, int | None], str | None]


def select(
    q: Tensor,
    k: Tensor,
    softcap: float | None = None,
    name: str = "auto",
    deterministic: bool = False,
    value_dim: int | None = None,
) -> Kernel:
    """The fastest kernel that supports the request, or the one named.

    deterministic: gradients must be bit-equal from run to run; a kernel whose fast backward is not uses a slower one.
    value_dim: head_dim of the values; None for that of the keys.
    Raises ValueError with the reason if the named kernel (with "auto", every kernel) refuses the request.
    """
    if name != "auto" and name not in FASTEST_FIRST:
        raise ValueError(f"kernel={name} is not one of auto, {', '.join(FASTEST_FIRST)}")
    reasons = []
    for candidate in FASTEST_FIRST if name == "auto" else (name,):
        kernel = _load(candidate, deterministic)
        if isinstance(kernel, Kernel) and (reason := kernel.supports(q, k, softcap, value_dim)) is None:
            return kernel
        reason = kernel if isinstance(kernel, str) else reason
        reasons.append(f"kernel={candidate} {reason}")
    raise ValueError("; ".join(reasons))


@functools.cache
def _load(name: str, deterministic: bool = False) -> Kernel | str:
    """The kernel, or the reason of `imported`."""
    files = ("blocked", "blocked") if name == "blocked" else (f"{name}_forward", f"{name}_backward")
    forward, backward = map(imported, files)
    if isinstance(forward, str):
        return forward
    if isinstance(backward, str):
        return backward
    call, round_dq = backward.backward, backward.round_dq
    if name == "hopper":  # the other kernels' gradients have one writer each
        call = functools.partial(call, deterministic=deterministic)
        if deterministic:
            round_dq = importlib.import_module("ringflash.kernels.portable_backward").round_dq
    return Kernel(
        name, forward.forward, backward.delta, backward.center, call, backward.round_into, round_dq, forward.supports
    )  # fmt: skip


@functools.cache
def imported(file: str) -> ModuleType | str:
    """A file of this package, imported on demand; or the reason, if Triton is missing or too old."""
    try:
        return importlib.import_module(f"ringflash.kernels.{file}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return f"needs Triton 3.6 or newer ({error}): pip install triton, or kernel=blocked, which is plain torch"
