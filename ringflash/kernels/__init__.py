"""Attention of one query shard on one key/value shard, on one device.

Every kernel has the same five functions and knows nothing of rings, layouts, documents or windows:

    forward(q, k, v, intervals, *, scale, softcap, carry, out, seen) -> Partial
    delta(out, dout) -> Tensor
    center(q, k, lse, *, scale) -> (Tensor, Tensor)
    backward(dout, q, k, v, lse, delta, intervals, *, scale, softcap, dq, dk, dv, center) -> None
    round_into(out, x) -> None

q [B, Sq, Hq, D]; k [B, Skv, Hkv, D]; v [B, Skv, Hkv, Dv]; dout [B, Sq, Hq, Dv]: any strides with a contiguous last
dimension; Hq a multiple of Hkv; Dv is D in the Hopper kernels.
Scores are ``scale * q k^T``, scale > 0, then ``softcap * tanh(scores / softcap)`` where softcap is not None. Keys and
values that no query sees must be finite all the same: tiles reach over an interval's edge, and 0 x NaN is NaN.

forward: `carry`, where given, is the Partial of keys seen before; it is updated in place and returned. `out`, where
given, [B, Sq, Hq, Dv] of q's dtype or fp32 and any strides with a contiguous last dimension, is written instead of
carry.out, all of it; lse is updated in place all the same. Without a carry the Partial is new, in fp32 but for `out`.
`seen`, where given beside `out`, is that of `mask.rows_seen` for this call, one of several over which an fp32 Partial
is carried. The last call that sees a tile of rows writes it to `out`, and not to the Partial; calls before that write
it to the Partial alone. After the last call `out` is complete. All of them are calls of one kernel.

backward: lse and delta, fp32 [B, Hq, Sq], are those of the whole softmax, over all shards: delta = rowsum(dout * out).
Gradients are *added* into dq, dk and dv, of the shapes of q, k and v, all fp32, with a contiguous last dimension.
Where `center` [B, 1, Hkv, D] is given, keys are k - center, and lse is theirs: the function center makes both, and
`compensation` says what for.
round_into writes such a sum, when it is complete, in the inputs' dtype.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

FASTEST_FIRST = ("hopper", "portable", "blocked")


@dataclass(frozen=True)
class Kernel:
    """The functions above, and `supports(q, k, softcap, value_dim)`: None, or the reason why the kernel cannot."""

    name: str
    forward: Callable
    delta: Callable[[Tensor, Tensor], Tensor]
    center: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable
    round_into: Callable[[Tensor, Tensor], None]
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

    deterministic: gradients must be bit-equal from run to run; a kernel whose fast backward is not takes a slower one.
    value_dim: head_dim of the values; None: that of the keys.
    Raises ValueError with the reason where the named kernel (or, with "auto", every kernel) cannot.
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
    """Import a kernel's files only when it is asked for; the reason, where Triton is missing or too old for them."""
    files = ("blocked", "blocked") if name == "blocked" else (f"{name}_forward", f"{name}_backward")
    try:
        forward, backward = (importlib.import_module(f"ringflash.kernels.{file}") for file in files)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return f"needs Triton 3.6 or newer ({error}): pip install triton, or kernel=blocked, which is plain torch"
    call = backward.backward
    if name == "hopper":  # the other kernels' gradients have one writer each
        call = functools.partial(call, deterministic=deterministic)
    return Kernel(
        name, forward.forward, backward.delta, backward.center, call, backward.round_into, forward.supports
    )  # fmt: skip
