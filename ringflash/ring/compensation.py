"""Compensation: gradients of 16-bit inputs that do not suffer from `out` having been rounded to 16 bits.

The backward makes delta = rowsum(dout * out). Where the rounding of out changes delta_i by e_i, it changes row i of the
scores' gradient, ds_ij = p_ij (dp_ij - delta_i), by p_ij e_i, and

    dq_i = scale sum_j ds_ij k_j    by    e_i scale sum_j p_ij k_j

which is small for keys around 0, and large for keys that have a mean, as those of trained models do. Two remedies:

Centered keys. A row of ds sums to 0 over the keys of all hops. So, for any constant c per batch row and KV head,

    dq_i = scale sum_j ds_ij (k_j - c)

in which e_i meets keys around 0. Scores of k - c differ from those of k by scale q_i . c, which is one number per row:
with lse - scale q . c for lse, p is unchanged. The kernels run unchanged on these two. Each rank takes a constant of
its own, the mean of its own keys, so nothing more is communicated.

The residue. A softcap does not allow scores to be shifted, and with a sink a row of ds does not sum to 0. There the
forward also keeps what rounding took from out, in 16 bits, and delta is made of both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SAMPLED = 1024  # keys, and queries, that are looked at, evenly spaced: a mean's error is 3 percent of their deviation
SIGNIFICANT = 16.0  # times its own sampling variance, which a mean must exceed (squared) to be used
WORTH = 0.06  # of the keys' variance, which it must also exceed: a smaller mean does less harm than rounding k - c
LARGEST = 2.0**14  # of keys that are centered: k - c of larger ones could leave fp16's range
BITS = 3  # of c's mantissa: k - c of keys much larger than c is then exact
SPREAD = 8.0  # of the scores of centered keys: where it is larger, their rounding would change the weights visibly


def key_mean(k: Tensor, q: Tensor, scale: float) -> Tensor:
    """c [B, 1, Hkv, D] of keys [B, S, Hkv, D] and the queries [B, S, Hq, D] that meet them, in the keys' dtype.

    It is 0 in a dimension whose mean may be chance or is small. Keys whose c is 0 stay as they are, bit for bit. k - c
    is rounded, and with it the scores, which the forward computed of k. Weights of large scores would change: there c
    is 0 in all dimensions of a head. This is decided on the device, without a host synchronisation.
    """
    keys, queries = (x[:, :: max(1, -(-x.shape[1] // SAMPLED))].float() for x in (k, q))
    count = keys.shape[1]
    mean, variance = keys.mean(1, keepdim=True), keys.var(1, correction=0, keepdim=True)
    used = mean.square() > variance * max(WORTH, SIGNIFICANT / max(count - 1, 1))
    used &= keys.abs().amax((1, 3), keepdim=True) <= LARGEST
    largest = queries.square().mean(1, keepdim=True).unflatten(2, (k.shape[2], -1)).amax(3)
    used &= scale**2 * (largest * variance * used).sum(-1, keepdim=True) <= SPREAD**2
    mantissa, exponent = torch.frexp(mean)
    coarse = torch.ldexp((mantissa * 2**BITS).round() / 2**BITS, exponent)
    return torch.where(used, coarse, 0.0).to(k.dtype)


class CenteredKeys:
    """k - c of each local rank's queries, in one place in memory, which the keys of each hop take in turn."""

    def __init__(self, own: list[Tensor], q: list[Tensor], scale: float) -> None:
        self.c = [key_mean(k, q_, scale) for k, q_ in zip(own, q, strict=True)]
        self.room = torch.empty(own[0].shape, dtype=own[0].dtype, device=own[0].device)

    def lse(
        self, lse: list[Tensor], q: list[Tensor], scale: float, rowsum: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor]:
        """lse - scale q . c, fp32 [B, Hq, S] by local rank.

        rowsum: of the product of two [B, S, Hq, D], as a kernel's delta is.
        """
        shifts = (
            rowsum(q_, c.repeat_interleave(q_.shape[2] // c.shape[2], 2).expand(q_.shape))
            for q_, c in zip(q, self.c, strict=True)
        )
        return [shift.mul_(-scale).add_(x) for x, shift in zip(lse, shifts, strict=True)]

    def keys(self, k: Tensor, i: int, rows: slice, heads: slice) -> Tensor:
        """k - c for local rank i, of `rows` and `heads` of a shard, [B, rows, heads, D] in k's dtype."""
        return torch.sub(k, self.c[i][:, :, heads], out=self.room[:, rows, heads])
