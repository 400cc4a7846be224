"""Loss by position: of tokens with 0 to 4k tokens of their document before them, with 4k to 8k, with 8k to 16k, ...

If a model uses what it read long before, its loss falls with the position. The bounds of the ranges double. The tokens
of a document are on all ranks: each rank sums the losses of its tokens by range, and all ranks' sums give the means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringflash.data.records import IGNORE

RANGES = 16
FIRST_BOUND = 4096  # tokens; each bound is twice the one before


def no_totals(device: torch.device) -> Tensor:
    """Zeros for `ByPosition`, float64 [2, RANGES]."""
    return torch.zeros(2, RANGES, dtype=torch.float64, device=device)


@dataclass(frozen=True, eq=False)
class ByPosition:
    """Collects losses by range. ranges: int64 [N], that of each token. totals: [2, RANGES], of losses and tokens."""

    ranges: Tensor
    totals: Tensor

    @classmethod
    def of(cls, inputs: dict[str, Any], totals: Tensor) -> ByPosition:
        """For a rank's inputs, whose predicted tokens are counted in `totals`."""
        found = cls(ranges_of(inputs["position_ids"].flatten()), totals)
        totals[1] += _sums((inputs["shift_labels"] != IGNORE).flatten(), found.ranges)
        return found

    def add(self, begin: int, losses: Tensor) -> None:
        """Add the losses [n] of tokens begin to begin + n."""
        self.totals[0] += _sums(losses, self.ranges[begin : begin + len(losses)])


def means(totals: Tensor) -> dict[str, float]:
    """Mean losses by the names of their ranges, such as "4k-8k"; empty if all tokens are of one range."""
    found = {name: loss / count for name, loss, count in zip(names(), *totals.tolist(), strict=True) if count}
    return found if len(found) > 1 else {}


def ranges_of(positions: Tensor) -> Tensor:
    """The range of each token, by how many tokens its document has before it: int64 like positions."""
    bounds = FIRST_BOUND * 2 ** torch.arange(RANGES - 1, device=positions.device)
    return torch.bucketize(positions, bounds, right=True)


def names() -> list[str]:
    """Those of the ranges."""
    bounds = [0, *(FIRST_BOUND * 2**i for i in range(RANGES - 1))]
    shown = [f"{x // 2**20}M" if x >= 2**20 else f"{x // 1024}k" if x >= 1024 else str(x) for x in bounds]
    return [f"{begin}-{end}" for begin, end in zip(shown, [*shown[1:], ""], strict=True)]


def _sums(values: Tensor, ranges: Tensor) -> Tensor:
    """The sum of the values [N] in each range, float64 [RANGES]; unlike scatter_add, with the same bits each time."""
    own = ranges == torch.arange(RANGES, device=ranges.device).unsqueeze(1)
    return torch.where(own, values, 0).sum(1, dtype=torch.float64)
