"""Exact attention for long contexts: Triton FlashAttention blocks combined across devices by a ring.

>>> import torch
>>> mask = IntervalMask.causal(12) & IntervalMask.documents([5, 7])
>>> plan = AttentionPlan(mask, Layout.zigzag(12, ranks=2), Loopback(2))
>>> q, k, v = torch.randn(3, 2, 6, 4, 32).unbind()  # two ranks of one sequence: [2, 12 / 2, heads, head size]
>>> ring_attention(q, k, v, plan).shape
torch.Size([2, 6, 4, 32])
"""

from ringflash.kernels.decode import flash_decode
from ringflash.layout import Layout
from ringflash.mask import IntervalMask
from ringflash.partial import Partial, merge
from ringflash.ring.attention import flash_attention, ring_attention
from ringflash.ring.plan import AttentionPlan
from ringflash.ring.recompute import keep_attention
from ringflash.ring.transport import Loopback, ProcessRing
from ringflash.ring.ulysses import Ulysses
from ringflash.ring.watchdog import Watchdog

__all__ = [
    "AttentionPlan",
    "IntervalMask",
    "Layout",
    "Loopback",
    "Partial",
    "ProcessRing",
    "Ulysses",
    "Watchdog",
    "flash_attention",
    "flash_decode",
    "keep_attention",
    "merge",
    "ring_attention",
]
__version__ = "0.1.0"
