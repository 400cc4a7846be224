"""Mixer: the functions of a kind of layer with linear attention, which are projection, recurrence and output.

Such layers carry a state over tokens. They have key heads and value heads. Each value head has a state, and as many
value heads share each key head. The ranks of a sequence share the value heads in equal blocks. A key head that value
heads of several blocks need is copied, so blocks need not be whole groups:

    2 key heads a b, 8 value heads, 4 ranks     rank 0       rank 1       rank 2       rank 3
    value heads                                 0 1          2 3          4 5          6 7
    key heads                                   a            a            b            b

`models.linear_attention` exchanges tokens for heads around the recurrence of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ringflash.ring.sequences import Sequences


class Projected(NamedTuple):
    """Features [B, n, F] of this rank's tokens: those of all key heads, those of all value heads, and the gate."""

    of_keys: Sequence[Tensor]
    of_values: Sequence[Tensor]
    gate: Tensor


@dataclass(frozen=True)
class Share:
    """One of `blocks` equal blocks of a layer's value heads, and the key heads that these need."""

    block: int
    blocks: int
    key_heads: int

    def of_values(self, weight: Tensor) -> Tensor:
        """The block's rows of a weight [rows of all value heads, ...]."""
        return weight if self.blocks == 1 else weight.unflatten(0, (self.blocks, -1))[self.block]

    def of_keys(self, weight: Tensor) -> Tensor:
        """The block's rows of a weight [rows of all key heads, ...]."""
        return self.of_values(copied(weight, 0, self.key_heads, self.blocks))


class Mixer(NamedTuple):
    """How a kind of layer mixes tokens. heads: the names of a module's numbers of key heads and of value heads.

    project: what a module makes of hidden states [B, n, H]. recur: the result [1, T, F] of a share of the heads, from
    its parts of what was projected, first those of key heads, each [1, T, F]. finish: the layer's result [B, n, H] from
    all heads' [B, n, F] and the gate.
    """

    heads: tuple[str, str]
    project: Callable[[Any, Tensor], Projected]
    recur: Callable[[Any, Sequence[Tensor], Share, Sequences], Tensor]
    finish: Callable[[Any, Tensor, Tensor], Tensor]


def divides(key_heads: int, value_heads: int, ranks: int) -> bool:
    """Whether `ranks` ranks can share the heads, with copies of key heads where blocks are not whole groups.

    >>> divides(8, 128, 4), divides(1, 48, 16), divides(8, 128, 12), divides(8, 96, 12)
    (True, True, False, True)
    """
    return value_heads % math.lcm(key_heads, ranks) == 0


def copied(x: Tensor, dim: int, key_heads: int, blocks: int) -> Tensor:
    """x with each key head's part of dimension `dim` copied, as often as `blocks` equal blocks need."""
    copies = blocks // math.gcd(key_heads, blocks)
    if copies == 1:
        return x
    return x.unflatten(dim, (key_heads, -1)).repeat_interleave(copies, dim).flatten(dim, dim + 1)
