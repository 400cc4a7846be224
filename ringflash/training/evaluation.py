"""Evaluation: the loss on held-out sequences, the same ones every time, in the mean and by position in a document.

Where a model uses what it read long before, the loss falls with the position. The bounds double: up to 4k tokens, 4k to
8k, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import deepspeed
import torch
from torch import Tensor

from ringflash.data import Evaluated, batch
from ringflash.data.batches import Batch
from ringflash.data.records import IGNORE
from ringflash.errors import ConfigError
from ringflash.training.loss import GROUPS
from ringflash.training.metrics import BY_POSITION
from ringflash.training.step import Layouts, shard
from ringflash.training.world import World


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss on documents that are not trained on."""

    every: int = 20
    """Steps between evaluations; 0: only before the first step and after the last."""

    sequences: int = 4
    """Held-out sequences per evaluation."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.sequences < 1:
            raise ConfigError(
                f"evaluation.every={self.every} must be 0 or more, evaluation.sequences={self.sequences} 1 or more"
            )


FIRST_BOUND = 4096  # tokens; each bound is twice the one before


@dataclass(frozen=True)
class HeldOut:
    """Mean losses in nats per predicted token, of all tokens and by position, such as "4k-8k", where any is there."""

    loss: float
    by_position: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, float]:
        """For the metrics: held_out_loss, and held_out_loss/4k-8k."""
        return {"held_out_loss": self.loss} | {BY_POSITION + name: x for name, x in self.by_position.items()}


@dataclass(frozen=True)
class Evaluation:
    """The first sequences of a held-out corpus, and what shards them."""

    config: EvaluationConfig
    corpus: Evaluated
    length: int
    world: World
    layout_for: Layouts

    def loss(self, engine: deepspeed.DeepSpeedEngine, sequences: int | None = None) -> HeldOut:
        """Losses over `sequences` of them (default: evaluation.sequences).

        What it exchanges is in no step's record.
        """
        batches = (
            batch(self.corpus, seed=0, step=i, batch_size=1, length=self.length)
            for i in range(sequences or self.config.sequences)
        )
        held_out = evaluate(engine, batches, self.world, self.layout_for)
        self.world.watchdog.drain()
        return held_out


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, batches: Iterable[Batch], world: World, layout_for: Layouts) -> HeldOut:
    """Losses over batches; every ring computes each batch in full."""
    engine.eval()
    total = torch.zeros(2, GROUPS, dtype=torch.float64, device=world.device)
    for sequences in batches:
        inputs = shard(sequences, world, layout_for)
        labels, groups = inputs["shift_labels"], _groups(inputs["position_ids"])
        total[0] += engine(**inputs, groups=groups)
        total[1] += torch.bincount(groups[labels != IGNORE], minlength=GROUPS)
    engine.train()
    losses, counts = world.sum(total).tolist()
    by_position = {name: x / n for name, x, n in zip(_names(), losses, counts, strict=True) if n}
    mean = sum(losses) / max(sum(counts), 1)
    return HeldOut(mean, by_position if len(by_position) > 1 else {})


def _groups(positions: Tensor) -> Tensor:
    """The group of each token, by how many tokens its document has before it."""
    bounds = FIRST_BOUND * 2 ** torch.arange(GROUPS - 1, device=positions.device)
    return torch.bucketize(positions, bounds, right=True)


def _names() -> list[str]:
    """Those of the groups."""
    bounds = [0, *(FIRST_BOUND * 2**i for i in range(GROUPS - 1))]
    shown = [f"{x // 2**20}M" if x >= 2**20 else f"{x // 1024}k" if x >= 1024 else str(x) for x in bounds]
    return [f"{begin}-{end}" for begin, end in zip(shown, [*shown[1:], ""], strict=True)]
