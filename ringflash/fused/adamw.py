"""AdamW on split weights, in one pass: weight, its low bits, both moments and the gradient, 16 bits each.

The arithmetic is that of `training.optimizers.split_adamw`, in fp32. Each moment is rounded to bf16 at random, up or
down with the probability that makes it right on average, from the bits of Philox at (seed, element).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
ELEMENTS = 2**30  # with one seed, so that an element's number fits 32 bits


def adamw_(
    weight: Tensor, low: Tensor, mean: Tensor, square: Tensor, gradient: Tensor,
    *, lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int, seed: int, begin: int = 0,
) -> None:  # fmt: skip
    """One step, in place. All tensors bf16, flat and contiguous; low holds int16 bits. step counts from 1.

    begin: the first element's number in the whole parameter, on which its random bits depend. One call must not cross a
    multiple of ELEMENTS.
    """
    _kernel[(triton.cdiv(weight.numel(), BLOCK),)](
        *(x.view(torch.int16) for x in (weight, low, mean, square)), gradient, weight.numel(), begin % ELEMENTS,
        lr, beta1, beta2, eps, lr * decay, 1.0 - beta1**step, 1.0 - beta2**step, seed + begin // ELEMENTS,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def _wide(bits):
    """bf16 bits as fp32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x, noise):
    """fp32 as bf16 bits, rounded by 16 random bits."""
    return ((x.to(tl.int32, bitcast=True) + (noise & 0xFFFF).to(tl.int32)) >> 16).to(tl.int16)


@triton.jit
def _kernel(
    high, low, mean, square, gradient, count, begin, lr, beta1, beta2, eps, decay, correct1, correct2, seed,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of elements."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gradient + at, inside, 0.0).to(tl.float32)
    m = beta1 * _wide(tl.load(mean + at, inside, 0)) + (1.0 - beta1) * g
    v = beta2 * _wide(tl.load(square + at, inside, 0)) + (1.0 - beta2) * g * g
    bits = (tl.load(high + at, inside, 0).to(tl.int32) << 16) + tl.load(low + at, inside, 0).to(tl.int32)
    w = bits.to(tl.float32, bitcast=True)
    w -= decay * w + lr * (m / correct1) / (tl.sqrt(v / correct2) + eps)
    bits = w.to(tl.int32, bitcast=True)
    nearest = (bits + 0x8000) >> 16
    noise = tl.randint(seed, begin + at)
    tl.store(high + at, nearest.to(tl.int16), inside)
    tl.store(low + at, (bits - (nearest << 16)).to(tl.int16), inside)
    tl.store(mean + at, _rounded(m, noise), inside)
    tl.store(square + at, _rounded(v, noise >> 16), inside)
