"""Evaluation: the mean loss on held-out sequences, the same ones every time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import deepspeed
import torch

from ringflash.data import TokenCorpus, batch
from ringflash.data.batches import Batch
from ringflash.data.records import IGNORE
from ringflash.errors import ConfigError
from ringflash.training.step import Layouts, shard
from ringflash.training.world import World


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss on documents that are not trained on."""

    every: int = 20
    """Steps between evaluations; 0: only at the end."""

    sequences: int = 4
    """Held-out sequences per evaluation."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.sequences < 1:
            raise ConfigError(
                f"evaluation.every={self.every} must be 0 or more, evaluation.sequences={self.sequences} 1 or more"
            )


@dataclass(frozen=True)
class Evaluation:
    """The first sequences of a held-out corpus, and what shards them."""

    config: EvaluationConfig
    corpus: TokenCorpus
    length: int
    world: World
    layout_for: Layouts

    def loss(self, engine: deepspeed.DeepSpeedEngine, sequences: int | None = None) -> float:
        """Mean loss per predicted token over `sequences` of them (default: evaluation.sequences).

        What it exchanges is in no step's record.
        """
        batches = (
            batch(self.corpus, seed=0, step=i, batch_size=1, length=self.length)
            for i in range(sequences or self.config.sequences)
        )
        loss = evaluate(engine, batches, self.world, self.layout_for)
        self.world.watchdog.drain()
        return loss


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, batches: Iterable[Batch], world: World, layout_for: Layouts) -> float:
    """Mean loss per predicted token over batches; every ring computes each batch in full."""
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for sequences in batches:
        inputs = shard(sequences, world, layout_for)
        total[0] += engine(**inputs)
        total[1] += (inputs["shift_labels"] != IGNORE).sum()
    engine.train()
    loss, valid = world.sum(total).tolist()
    return loss / max(valid, 1)
