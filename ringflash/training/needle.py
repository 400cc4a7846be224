"""Needle in a haystack during training: on the run's own ranks and weights, between steps, which it does not change.

All ranks of a replica share the cache of a haystack, whatever their grid; every replica searches the same haystacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import deepspeed
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ringflash.data.tokenizer import encoder
from ringflash.errors import ConfigError
from ringflash.haystack import Cell, HaystackConfig, Row, read_text, rows_of, search
from ringflash.models import ModelConfig, RingCache, cache_refusal
from ringflash.models.rope_length import length_refusal
from ringflash.reading import check_positions, check_room
from ringflash.ring.cache_plan import CHUNK
from ringflash.ring.transport import ProcessRing
from ringflash.training.world import World, replica_ring

if TYPE_CHECKING:
    from ringflash.training.config import Config


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
        """With lengths where there are none."""
        return self if self.lengths else replace(self, lengths=(sequence_length,))

    def check(self, sequence_length: int, model: ModelConfig, hf_config: PreTrainedConfig) -> None:
        """Raise ConfigError for a model that cannot be searched, and for lengths beyond its positions."""
        if not self.every:
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


@dataclass(frozen=True, eq=False)
class Needles:
    """What is searched, every how many steps, and by which ranks."""

    every: int
    rows: list[Row]
    ring: ProcessRing
    chunk: int
    kernel: str
    world: World

    @classmethod
    def of(cls, config: Config, tokenizer: PreTrainedTokenizerBase, world: World) -> Needles | None:
        """Those of a run's settings, if there are any; all ranks call it.

        Raises ConfigError, on every rank, for a text that cannot be read and a length that is too short.
        """
        length = config.data.sequence_length
        asked = config.evaluation.needle.of_length(length)
        if not asked.every:
            return None
        rows = rows_of(asked, read_text(asked, world), encoder(tokenizer, config.data.tokenizer), config.seed)
        ring = replica_ring(world, config.parallel)
        chunk = max(2 * ring.size, min(CHUNK, length))  # the run has memory for `length` tokens at once
        return cls(asked.every, rows, ring, chunk, config.attention.kernel, world)

    @torch.no_grad()
    def search(self, engine: deepspeed.DeepSpeedEngine, rows: Iterable[Row] | None = None) -> list[Cell]:
        """The cells of rows (default: all), by the engine's weights as they are; the engine trains on.

        Raises ConfigError, on every rank, where the memory of any does not suffice.
        """
        model, cells = engine.module.model, []
        engine.eval()
        for row in self.rows if rows is None else rows:
            cache = RingCache(
                model, row.length, ring=self.ring, chunk=self.chunk, kernel=self.kernel, rope_length=row.length
            )
            check_room(f"evaluation.needle.lengths={row.length} tokens", cache, self.world)
            cells += search(model, row, cache)
        engine.train()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()  # so that training has the memory that it had
        self.world.watchdog.drain()  # what was exchanged is in no step's record
        return cells

    def first(self) -> Iterable[Row]:
        """One cell of the longest row, which shows that all can be searched."""
        longest = max(self.rows, key=lambda row: row.length)
        return [replace(longest, tasks=dict([*longest.tasks.items()][:1]))]


def record(cells: list[Cell]) -> dict[str, float]:
    """For the metrics: needle_found and needle_loss in the mean, and of each cell, as needle_loss/4096-50."""
    found = {"needle_found": [float(x.found) for x in cells], "needle_loss": [x.loss for x in cells]}
    means = {name: sum(values) / len(values) for name, values in found.items()}
    of_cells = {
        f"{name}/{cell.length}-{cell.depth}": value
        for name, values in found.items()
        for cell, value in zip(cells, values, strict=True)
    }
    return means | of_cells
