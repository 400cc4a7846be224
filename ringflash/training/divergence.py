"""Divergence: steps whose loss or gradient norm is not finite, and weights that are not finite.

`train_step` skips the update of such a step. The step is reported and writes no checkpoint, and three of them in a row
end the run. All ranks have the same figures, so all make the same decision.
"""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.utils import has_inf_or_nan
from torch import Tensor

from ringflash.distributed.world import World
from ringflash.errors import DivergedError
from ringflash.training.metrics import Metrics

LIMIT = 3  # steps in a row: one may be caused by its batch, three are caused by the weights
WATCHED = ("loss", "gradient_norm", "held_out_loss")
ADVICE = (
    "a lower optim.lr or a longer optim.warmup may keep it from diverging, also with resume=auto from its last "
    "checkpoint; so may a lower optim.clip in a new run"
)


class Divergence:
    """Counts consecutive steps whose figures are not finite. metrics: the run's, on rank 0."""

    def __init__(self, world: World, metrics: Metrics | None) -> None:
        self.world, self.metrics = world, metrics
        self.in_a_row = 0

    def finite(self, step: int, record: dict[str, float]) -> bool:
        """Whether the step's figures are finite. Reports those that are not. Raises DivergedError after LIMIT steps."""
        faults = _faults(record)
        self.in_a_row = self.in_a_row + 1 if faults else 0
        if not faults:
            return True
        message = f"step {step}: {faults}: {self.in_a_row} of {LIMIT} steps in a row that end the run"
        if self.in_a_row == LIMIT:
            self._end(message)
        if self.metrics is not None:
            self.metrics.write_line(message)
        return False

    def check_end(self, step: int, held_out: float | None) -> None:
        """Raise DivergedError if the last step or the loss after it is not finite, so that no model is written."""
        record = {} if held_out is None else {"held_out_loss": held_out}
        faults = _faults(record)
        if faults and self.metrics is not None:
            self.metrics.log(step, record)
        if self.in_a_row or faults:
            self._end(f"step {step}, the last: {faults or 'its loss or gradient norm is not finite'}")

    def _end(self, message: str) -> None:
        # The launcher ends all ranks as soon as one exits, so rank 0 must finish first.
        with self.world.without_timeout("finishing wandb's run"):
            if self.metrics is not None:
                self.metrics.close(exit_code=1)
        raise DivergedError(f"{message}; no checkpoint or model is written; {ADVICE}")


def check_weights(engine: deepspeed.DeepSpeedEngine, world: World, file: object) -> None:
    """Raise DivergedError on every rank if a weight is not finite, before `file` is written."""
    found = torch.stack([has_inf_or_nan(_local_weights(p, world)) for p in engine.module.parameters()]).any()
    if world.any(bool(found)):
        raise DivergedError(f"{file} is not written: the weights are not finite; {ADVICE}")


def _local_weights(p: Any, world: World) -> Tensor:
    """This rank's part of a parameter, which ZeRO 3 shards; without the padding, which is never written."""
    if not hasattr(p, "ds_tensor"):
        return p.detach()
    size = p.ds_tensor.numel()
    return p.ds_tensor.detach()[: max(0, min(size, p.ds_numel - size * world.rank))]


def _faults(record: dict[str, float]) -> str:
    """Those of the WATCHED figures that are not finite, with their values."""
    faults = {name: record[name] for name in WATCHED if not math.isfinite(record.get(name, 0.0))}
    return ", ".join(f"{name.replace('_', ' ').replace('held out', 'held-out')} {x}" for name, x in faults.items())
