"""Compensation: gradients that do not suffer from the rounding of `out`.

The backward makes delta = rowsum(dout * out). Where the rounding of out changes delta_i by e_i, it changes row i of the
scores' gradient, ds_ij = p_ij (dp_ij - delta_i), by p_ij e_i, and

    dq_i = scale sum_j ds_ij k_j    by    e_i scale sum_j p_ij k_j

which is small for keys around 0, and large for keys that have a mean, as those of trained models do. Two remedies:

Centered keys. A row of ds sums to 0 over the keys of all hops. So, for any constant c per batch row and KV head,

    dq_i = scale sum_j ds_ij (k_j - c)

in which e_i meets keys around 0. Scores of k - c differ from those of k by scale q_i . c, which is one number per row:
with lse - scale q . c for lse, p is unchanged. `center` makes c and that lse; a kernel's backward subtracts c from the
keys that it is given. Each rank takes a constant of its own, the mean of its own keys, so nothing more is communicated.

The residue. A softcap does not allow scores to be shifted, and with a sink a row of ds does not sum to 0. There the
forward of 16-bit inputs also keeps what rounding took from out, in 16 bits, and delta is made of both.

This file has the constants and the definition in plain torch; `portable_compensation` has the same for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLED = 256  # keys, and queries, that are looked at, evenly spaced: a mean's error is 6 percent of their deviation
SIGNIFICANT = 16.0  # times its own sampling variance, which a mean must exceed (squared) to be used
WORTH = 0.06  # of the keys' variance, which it must also exceed: a smaller mean does less harm than rounding k - c
LARGEST = 14.0  # of c in fp16: k - c of the largest number is then rounded to it, not to infinity
BITS = 3  # of c's mantissa: k - c of keys much larger than c is then exact
SPREAD = 8.0  # of the scores of centered keys: where it is larger, their rounding would change the weights visibly


def sampling(rows: int) -> tuple[int, int]:
    """(step, count): every step-th of the rows is looked at, count in all."""
    step = max(1, -(-rows // SAMPLED))
    return step, -(-rows // step)


def center(q: Tensor, k: Tensor, lse: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """c [B, 1, Hkv, D] in k's dtype, and lse - scale q . c, fp32 [B, Hq, S]: the lse of keys k - c.

    q [B, S, Hq, D], k [B, S', Hkv, D], lse [B, Hq, S]. c is 0 in a dimension whose mean may be chance or is small.
    Keys whose c is 0 stay as they are, bit for bit. k - c is rounded, and with it the scores, which the forward
    computed of k. Weights of large scores would change: there c is 0 in all dimensions of a head. This is decided on
    the device, without a host synchronisation.
    """
    c = _mean(q, k, scale)
    group = q.shape[2] // k.shape[2]
    shift = (q.float() * c.float().repeat_interleave(group, 2)).sum(-1).transpose(1, 2)
    return c, lse - scale * shift


def _mean(q: Tensor, k: Tensor, scale: float) -> Tensor:
    keys, queries = (x[:, :: sampling(x.shape[1])[0]].float() for x in (k, q))
    variance, mean = torch.var_mean(keys, 1, correction=0, keepdim=True)
    used = mean.square() > variance * least_share(keys.shape[1])
    largest = queries.square().mean(1, keepdim=True).unflatten(2, (k.shape[2], -1)).amax(3)
    used &= scale**2 * (largest * variance * used).sum(-1, keepdim=True) <= SPREAD**2
    mantissa, exponent = torch.frexp(mean)
    coarse = torch.ldexp((mantissa * 2**BITS).round() / 2**BITS, exponent)
    if k.dtype == torch.float16:
        coarse = coarse.clamp(-LARGEST, LARGEST)
    return torch.where(used, coarse, 0.0).to(k.dtype)


def least_share(count: int) -> float:
    """Of the variance of `count` keys: the square that their mean must exceed to be used."""
    return max(WORTH, SIGNIFICANT / max(count - 1, 1))
