"""Compensation: protect gradients from the rounding of `out`.

The backward computes delta = rowsum(dout * out). If the rounding of out changes delta_i by e_i, then row i of the
scores' gradient, ds_ij = p_ij (dp_ij - delta_i), changes by p_ij e_i, and

    dq_i = scale sum_j ds_ij k_j    by    e_i scale sum_j p_ij k_j

This is small if keys are centered at 0, and large if they have a mean, as in trained models. There are two remedies:

Centered keys. A row of ds sums to 0 over the keys of all hops. So, for any constant c per batch row and KV head,

    dq_i = scale sum_j ds_ij (k_j - c)

and e_i is multiplied by keys centered at 0. Scores of k - c differ from those of k by scale q_i . c, one number per
row, so with lse - scale q . c as lse, p is unchanged. `center` computes c and that lse; a kernel's backward subtracts c
from its keys. Each rank uses the mean of its own keys, so nothing more is communicated.

The residue. With a softcap, scores cannot be shifted. With a sink, or if lse has a gradient, a row of ds does not sum
to 0. For these, the forward of 16-bit inputs also keeps the rounding error of out, in 16 bits, and delta is computed
from both.

This file has the constants and the definition in plain torch; `portable_compensation` has the same for a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAMPLED = 256  # sampled keys, and queries, evenly spaced: a mean's error is 6 percent of their deviation
SIGNIFICANT = 16.0  # a mean is used only if its square exceeds its sampling variance by this factor,
WORTH = 0.06  # and this fraction of the keys' variance: a smaller mean does less harm than rounding k - c
LARGEST = 14.0  # largest |c| in fp16: k - c of the largest number is then rounded to it, not to infinity
FEWEST = 8  # sampled keys of which a mean is used: the variance of 2 or 3 may be small by chance
BITS = 3  # of c's mantissa: k - c of keys much larger than c is then exact
SPREAD = 8.0  # largest deviation of the scores of centered keys: beyond it, rounding would change the weights visibly


def sampling(rows: int) -> tuple[int, int]:
    """(step, count): every step-th row is sampled, count in all."""
    step = max(1, -(-rows // SAMPLED))
    return step, -(-rows // step)


def center(q: Tensor, k: Tensor, lse: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """c [B, 1, Hkv, D] in k's dtype, and lse - scale q . c, fp32 [B, Hq, S]: the lse of keys k - c.

    q [B, S, Hq, D], k [B, S', Hkv, D], lse [B, Hq, S]. c is 0 in dimensions whose mean is small or may be chance. Keys
    whose c is 0 are unchanged, bit for bit. The forward computed its scores from k, and rounding k - c changes large
    ones visibly. If a head's scores are large, c is therefore 0 in all its dimensions. The device decides all this,
    without a host synchronisation.
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
    """The fraction of the variance of `count` keys that their mean's square must exceed for the mean to be used.

    The variance of fewer than FEWEST keys tells little about the keys of other ranks: then no mean is used.
    """
    return max(WORTH, SIGNIFICANT / (count - 1)) if count >= FEWEST else math.inf
