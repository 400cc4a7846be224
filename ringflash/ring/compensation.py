"""Compensation: gradients that do not suffer from the rounding of `out`.

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
forward of 16-bit inputs also keeps what rounding took from out, in 16 bits, and delta is made of both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ringflash.ring.ranges import Ranges

SAMPLED = 1024  # keys, and queries, that are looked at, evenly spaced: a mean's error is 3 percent of their deviation
SIGNIFICANT = 16.0  # times its own sampling variance, which a mean must exceed (squared) to be used
WORTH = 0.06  # of the keys' variance, which it must also exceed: a smaller mean does less harm than rounding k - c
LARGEST = 14.0  # of c in fp16: k - c of the largest number is then rounded to it, not to infinity
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
    variance, mean = torch.var_mean(keys, 1, correction=0, keepdim=True)
    used = mean.square() > variance * max(WORTH, SIGNIFICANT / max(count - 1, 1))
    largest = queries.square().mean(1, keepdim=True).unflatten(2, (k.shape[2], -1)).amax(3)
    used &= scale**2 * (largest * variance * used).sum(-1, keepdim=True) <= SPREAD**2
    mantissa, exponent = torch.frexp(mean)
    coarse = torch.ldexp((mantissa * 2**BITS).round() / 2**BITS, exponent)
    if k.dtype == torch.float16:
        coarse = coarse.clamp(-LARGEST, LARGEST)
    return torch.where(used, coarse, 0.0).to(k.dtype)


class CenteredKeys:
    """k - c of each local rank's queries, in one place in memory, which the keys of each hop take in turn."""

    def __init__(self, own: list[Tensor], q: list[Tensor], scale: float) -> None:
        self.c = [key_mean(k, q_, scale) for k, q_ in zip(own, q, strict=True)]
        # Zeros: a kernel's tiles read past the keys that are seen, and 0 times what is there must be 0.
        self.room = torch.zeros(own[0].shape, dtype=own[0].dtype, device=own[0].device)

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

    def keys(self, k: Tensor, i: int, seen: Ranges, rows: slice, heads: slice) -> Tensor:
        """k - c for local rank i, of `rows` and `heads` of a shard, [B, rows, heads, D] in k's dtype.

        Only the rows that are seen, counted from the first of `rows`, are those of k; the others are finite.
        """
        room = self.room[:, rows, heads]
        for begin, end in seen:
            torch.sub(k[:, begin:end], self.c[i][:, :, heads], out=room[:, begin:end])
        return room
