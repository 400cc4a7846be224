"""Loss by position: of tokens with 0 to 4k tokens of their document before them, with 4k to 8k, with 8k to 16k, ...

If a model uses what it read long before, its loss falls with the position. The bounds of the ranges double. The tokens
of a document are on all ranks: each rank sums the losses of its tokens by range, and all ranks' sums give the means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringflash.data.records import IGNORE
from ringflash.training.loss import Sums, sums_by

RANGES = 16
FIRST_BOUND = 4096  # tokens; each bound is twice the one before


def no_totals(device: torch.device) -> Tensor:
    """Zeros for `by_position`, float64 [2, RANGES]."""
    return torch.zeros(2, RANGES, dtype=torch.float64, device=device)


def by_position(inputs: dict[str, Any], totals: Tensor) -> Sums:
    """Collects the losses of a rank's inputs in totals[0]; totals[1] counts their predicted tokens. Of `no_totals`."""
    ranges = ranges_of(inputs["position_ids"].flatten())
    totals[1] += sums_by((inputs["shift_labels"] != IGNORE).flatten(), ranges, RANGES)
    return Sums(ranges, totals[0])


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
