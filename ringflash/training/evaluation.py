"""Evaluation: its settings, and the loss on held-out sequences, the same ones every time.

The loss is a mean over all tokens, by position in a document, and by source. Searches for needles are in `needle`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

import deepspeed
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ringflash.data import Evaluated, batch
from ringflash.data.batches import Batch
from ringflash.distributed.parallel import LayoutChooser
from ringflash.distributed.world import World
from ringflash.errors import ConfigError, shown
from ringflash.evaluation.haystack import HaystackConfig
from ringflash.models import ModelConfig
from ringflash.models.cache import cache_refusal
from ringflash.models.rope import check_positions
from ringflash.models.rope_length import length_refusal
from ringflash.training import positions
from ringflash.training.metrics import HELD_OUT, HELD_OUT_BY_POSITION, HELD_OUT_BY_SOURCE
from ringflash.training.preferences import preference_loss
from ringflash.training.step import forward, shard

SEED = 0  # of the order of held-out sequences, the same in every evaluation


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(HaystackConfig):
    """Needle-in-a-haystack searches."""

    every: int = 0
    """Steps between searches. There is also one before the first step and one after the last. 0: no searches."""

    lengths: tuple[int, ...] = ()
    """Lengths in tokens, of haystack, needle, question and answer together; []: data.sequence_length."""

    group = "evaluation.needle."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 0:
            raise ConfigError(f"evaluation.needle.every={self.every} must be 0 or more")
        if not self.depths:
            raise ConfigError("evaluation.needle.depths=[] must have one depth or more, 0 to 100 percent")

    def of_length(self, sequence_length: int) -> NeedleConfig:
        """These settings, with one length of `sequence_length` if none are set."""
        return self if self.lengths else replace(self, lengths=(sequence_length,))

    def check(self, sequence_length: int, model: ModelConfig, hf_config: PreTrainedConfig) -> None:
        """Raise ConfigError for settings without effect, a model that cannot be searched, and too long lengths."""
        if not self.every:
            for f in fields(self):
                if (value := getattr(self, f.name)) != f.default:
                    raise ConfigError(
                        f"evaluation.needle.{f.name}={shown(value)} has no effect with evaluation.needle.every=0"
                    )
            return
        if (reason := cache_refusal(hf_config)) is not None:
            raise ConfigError(f"evaluation.needle.every={self.every}: {reason}; set evaluation.needle.every=0")
        for length in self.of_length(sequence_length).lengths:
            name = f"evaluation.needle.lengths={length}"
            if (
                model.rope_length is None
                and (reason := length_refusal(hf_config, length, per_document=True)) is not None
            ):
                raise ConfigError(f"{name}: {reason}")
            if not model.extrapolate_positions:
                check_positions(f"{name} tokens", length, hf_config, "model.extrapolate_positions")


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss on held-out documents, and searches for needles in long texts."""

    every: int = 20
    """Steps between evaluations; 0: only before the first step and after the last."""

    sequences: int = 4
    """Held-out sequences per evaluation; all of them, if a single source has fewer."""

    patience: int | None = None
    """With checkpoint.keep_best, end the run after this many evaluations in a row without a lower held-out loss; null:
    never."""

    needle: NeedleConfig = field(default_factory=NeedleConfig)

    def __post_init__(self) -> None:
        if self.every < 0 or self.sequences < 1:
            raise ConfigError(
                f"evaluation.every={self.every} must be 0 or more, evaluation.sequences={self.sequences} 1 or more"
            )
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"evaluation.patience={self.patience} must be 1 or more, or null")


@dataclass(frozen=True)
class HeldOut:
    """Mean losses in nats per predicted token: over all tokens, by range of positions, such as "4k-8k", and by source.

    by_source is empty if there is one source alone. With preferences, losses are per pair, and none is by position;
    rewards has the other means, such as "rewards/margins". predicted: the number of tokens, or of pairs.
    """

    loss: float
    by_position: dict[str, float] = field(default_factory=dict)
    by_source: dict[str, float] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)
    predicted: int = 0

    def record(self) -> dict[str, float]:
        """For the metrics: held_out_loss, held_out_loss/4k-8k, held_out_loss_of/books, held_out_rewards/margins."""
        by_position = {HELD_OUT_BY_POSITION + name: x for name, x in self.by_position.items()}
        by_source = {HELD_OUT_BY_SOURCE + name: x for name, x in self.by_source.items()}
        rewards = {HELD_OUT + name: x for name, x in self.rewards.items()}
        return {HELD_OUT + "loss": self.loss} | by_position | by_source | rewards


@dataclass(frozen=True)
class Evaluation:
    """The first sequences of a held-out corpus, and the layouts and ranks that share them."""

    config: EvaluationConfig
    corpus: Evaluated
    length: int
    world: World
    layout_for: LayoutChooser

    @property
    def numbers(self) -> range:
        """The numbers of the evaluated sequences: evaluation.sequences, or all of a single source.

        The shares of several sources may repeat some before others come.
        """
        asked = self.config.sequences
        alone = len(self.corpus.sources) == 1
        return range(min(asked, self.corpus.epoch_length(self.length)) if alone else asked)

    @property
    def identity(self) -> str:
        """What the losses are of: two evaluations of one identity can be compared."""
        return f"{len(self.numbers)} sequences of {self.corpus.digest}"

    @property
    def left_out(self) -> list[str]:
        """The sources that no evaluated sequence is from."""
        evaluated = {*map(self.corpus.source_of, self.numbers)}
        return [source for source in self.corpus.sources if source not in evaluated]

    def loss(self, engine: deepspeed.DeepSpeedEngine, sequences: int | None = None) -> HeldOut:
        """Losses over the first `sequences` of them (default: all that are evaluated).

        What it exchanges is in no step's record.
        """
        numbers = self.numbers[:sequences]
        batches = (batch(self.corpus, seed=SEED, step=i, batch_size=1, length=self.length) for i in numbers)
        sources = map(self.corpus.source_of, numbers)
        held_out = evaluate(engine, batches, self.world, self.layout_for, sources)
        if not held_out.predicted and sequences is None:
            raise ConfigError(
                f"evaluation.sequences={self.config.sequences}: no token of these held-out sequences has a label, so "
                f"there is no loss: raise it, or hold out other text"
            )
        self.world.watchdog.drain()
        return held_out


@torch.no_grad()
def evaluate(
    engine: deepspeed.DeepSpeedEngine,
    batches: Iterable[Batch],
    world: World,
    layout_for: LayoutChooser,
    sources: Iterable[str] = itertools.repeat(""),
) -> HeldOut:
    """Losses over batches; every ring computes each batch in full. sources: the name of each batch's source."""
    engine.eval()
    of_source: dict[str, tuple[Tensor, Tensor]] = {}
    for sequences, source in zip(batches, sources, strict=False):
        none = positions.no_totals(world.device), preference_loss.no_totals(world.device)
        inputs = shard(engine, sequences, world, layout_for)
        forward(engine, inputs, *of_source.setdefault(source, none))
    engine.train()
    for totals in of_source.values():
        for x in totals:
            world.sum(x)
    of_tokens, of_pairs = (torch.stack(x).sum(0) for x in zip(*of_source.values(), strict=True))
    loss, count = _loss(of_tokens, of_pairs)
    sums = {source: _loss(*totals) for source, totals in of_source.items()}
    by_source = {source: x / labels for source, (x, labels) in sums.items() if labels}
    return HeldOut(
        loss / max(count, 1),
        positions.means(of_tokens),
        by_source if len(sums) > 1 else {},
        preference_loss.means(of_pairs),
        round(count),
    )


def _loss(of_tokens: Tensor, of_pairs: Tensor) -> list[float]:
    """The summed loss and the number of tokens or pairs, of totals one of which is zero."""
    return (of_tokens.sum(1) + of_pairs[:, 0]).tolist()
