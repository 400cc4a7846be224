"""Partial: attention over some of the keys, in a form that combines exactly with attention over the others.

For one query with scores s_j over a set of keys,

    lse = log sum_j exp(s_j)          out = sum_j exp(s_j - lse) v_j

(out, lse) is the whole state of a softmax: running maximum, running sum and unnormalised output follow from it. Two of
them over disjoint key sets combine by online-softmax rescaling (Milakov and Gimelshein, arXiv:1805.02867; Dao et al.,
arXiv:2205.14135):

    lse = log(exp(lse_a) + exp(lse_b))          out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

which is associative and commutative, with identity (0, -inf). Ring hops, split-KV decoding, attention sinks and ranks
holding parts of a cache all combine this way. This file is the definition; the kernels do the same in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Partial:
    """Normalised output and natural log-sum-exp of attention over some keys.

    out [B, Sq, Hq, D], fp32 while parts are still to come; lse fp32 [B, Hq, Sq]. A query that has seen nothing has
    out 0 and lse -inf.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def identity(cls, q: Tensor) -> Partial:
        """The Partial of no keys at all, for queries like q [B, Sq, Hq, D]."""
        batch, length, heads, _ = q.shape
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        return cls(out, out.new_full((batch, heads, length), float("-inf")))


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both, in fp32. The key sets must be disjoint; queries and shapes are the same."""
    largest = torch.maximum(a.lse, b.lse)
    largest = torch.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf would be NaN
    weight_a, weight_b = torch.exp(a.lse - largest), torch.exp(b.lse - largest)
    total = weight_a + weight_b
    scale = torch.where(total == 0, 0.0, 1 / total)
    per_row_a, per_row_b = ((w * scale).transpose(1, 2).unsqueeze(-1) for w in (weight_a, weight_b))
    return Partial(a.out.float() * per_row_a + b.out.float() * per_row_b, largest + torch.log(total))


def merge_sink(state: Partial, sink: Tensor) -> None:
    """Merge with one more key for each head, of score `sink` [Hq] and value 0, in place. state.out is fp32."""
    total = torch.logaddexp(state.lse, sink.float()[None, :, None])
    weight = torch.exp(state.lse - total).masked_fill_(total == float("-inf"), 0.0)  # -inf - -inf would be NaN
    state.out.mul_(weight.transpose(1, 2).unsqueeze(-1))
    state.lse.copy_(total)
