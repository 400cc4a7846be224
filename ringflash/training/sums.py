"""Sums of tokens' losses by group of tokens, such as their document. They are collected tile by tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sums:
    """groups: int64 [N], that of each token. totals: float64 [groups], to which losses are added."""

    groups: Tensor
    totals: Tensor

    def add(self, begin: int, losses: Tensor) -> None:
        """Add the losses [n] of tokens begin to begin + n."""
        self.totals.add_(sums_by(losses, self.groups[begin : begin + len(losses)], len(self.totals)))


def sums_by(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """The sum of the values [N] in each of `count` groups, float64; unlike scatter_add, the same bits each time."""
    own = groups == torch.arange(count, device=groups.device).unsqueeze(1)
    return torch.where(own, values, 0).sum(1, dtype=torch.float64)
