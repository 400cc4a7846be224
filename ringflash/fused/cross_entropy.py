"""Cross entropy of a tile of logits, and its gradient written over them.

One program per token reads its logits twice: first for logsumexp, by the online softmax, then for the gradient
(softmax(z) - onehot(y)) dz, where dz is the derivative of the softcap, or 1 without one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
LOG2_E = tl.constexpr(1.4426950408889634)


def cross_entropy_(logits: Tensor, labels: Tensor, ignored: int, softcap: float | None = None) -> Tensor:
    """Losses, fp32 [N]; logits [N, V], contiguous, are overwritten by the gradient of the losses' sum.

    logits fp16, bf16 or fp32; labels int64 [N]. Loss and gradient are 0 for labels equal to `ignored`. With a softcap,
    z = softcap tanh(logits / softcap).
    """
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    _kernel[(rows,)](
        logits, labels, losses, vocabulary, softcap or 1.0, ignored,
        CAPPED=softcap is not None, BLOCK=block, num_warps=max(4, min(16, block // 512)),
    )  # fmt: skip
    return losses


@triton.jit
def _capped(z, softcap, CAPPED: tl.constexpr):
    """Capped logits and the cap's derivative; -inf, which pads a block, stays -inf."""
    slope = tl.full(z.shape, 1.0, tl.float32)
    if CAPPED:  # tanh x from e = exp(-2 |x|): 1 - tanh^2 is 4 e / (1 + e)^2, which does not cancel
        x = z / softcap
        e = tl.exp(-2.0 * tl.abs(x))
        tanh = (1.0 - e) / (1.0 + e)
        z = tl.where(z == float("-inf"), z, softcap * tl.where(x < 0, -tanh, tanh))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return z, slope


@triton.jit
def _kernel(logits, labels, losses, vocabulary, softcap, ignored, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """One token."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * vocabulary
    if label == ignored:
        for begin in range(0, vocabulary, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            tl.store(logits + at, tl.zeros([BLOCK], logits.dtype.element_ty), at < vocabulary)
        tl.store(losses + row, 0.0)
    else:
        # Loaded first: between here and the first overwriting store, the reductions synchronise the program's warps.
        of_label, _of_slope = _capped(tl.load(logits + label + tl.arange(0, 1)).to(tl.float32), softcap, CAPPED)
        top = float("-inf")
        total = 0.0
        for begin in range(0, vocabulary, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            z, _slope = _capped(tl.load(logits + at, at < vocabulary, float("-inf")).to(tl.float32), softcap, CAPPED)
            higher = tl.maximum(top, tl.max(z, 0))
            total = total * tl.exp2((top - higher) * LOG2_E) + tl.sum(tl.exp2((z - higher) * LOG2_E), 0)
            top = higher
        lse = top + tl.log(total)
        tl.store(losses + row + tl.arange(0, 1), lse - of_label)
        for begin in range(0, vocabulary, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            z, slope = _capped(tl.load(logits + at, at < vocabulary, float("-inf")).to(tl.float32), softcap, CAPPED)
            p = tl.exp2((z - lse) * LOG2_E)
            d = tl.where(at == label, p - 1.0, p) * slope
            tl.store(logits + at, d.to(logits.dtype.element_ty), at < vocabulary)
