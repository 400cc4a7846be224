"""Evaluation: the loss on held-out sequences, the same ones every time, in the mean and by position in a document."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import deepspeed
import torch

from ringflash.data import Evaluated, batch
from ringflash.data.batches import Batch
from ringflash.errors import ConfigError
from ringflash.training.metrics import HELD_OUT_BY_POSITION
from ringflash.training.needle import NeedleConfig
from ringflash.training.parallel import LayoutChooser
from ringflash.training.positions import ByPosition, means, no_totals
from ringflash.training.step import shard
from ringflash.training.world import World


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss on held-out documents, and searches for needles in long texts."""

    every: int = 20
    """Steps between evaluations; 0: only before the first step and after the last."""

    sequences: int = 4
    """Held-out sequences per evaluation."""

    needle: NeedleConfig = field(default_factory=NeedleConfig)
    """Needle-in-a-haystack searches."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.sequences < 1:
            raise ConfigError(
                f"evaluation.every={self.every} must be 0 or more, evaluation.sequences={self.sequences} 1 or more"
            )


@dataclass(frozen=True)
class HeldOut:
    """Mean losses in nats per predicted token: over all tokens, and by range of positions, such as "4k-8k"."""

    loss: float
    by_position: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, float]:
        """For the metrics: held_out_loss, and held_out_loss/4k-8k."""
        return {"held_out_loss": self.loss} | {HELD_OUT_BY_POSITION + name: x for name, x in self.by_position.items()}


@dataclass(frozen=True)
class Evaluation:
    """The first sequences of a held-out corpus, and what shards them."""

    config: EvaluationConfig
    corpus: Evaluated
    length: int
    world: World
    layout_for: LayoutChooser

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
def evaluate(
    engine: deepspeed.DeepSpeedEngine, batches: Iterable[Batch], world: World, layout_for: LayoutChooser
) -> HeldOut:
    """Losses over batches; every ring computes each batch in full."""
    engine.eval()
    totals = no_totals(world.device)
    for sequences in batches:
        inputs = shard(sequences, world, layout_for, engine.module.model.config)
        engine(**inputs, by_position=ByPosition.of(inputs, totals))
    engine.train()
    loss, count = world.sum(totals).sum(1).tolist()
    return HeldOut(loss / max(count, 1), means(totals))
