"""Needle in a haystack during training: on the run's own ranks and weights, between steps, which it does not change.

All ranks of a replica share the cache of a haystack, whatever their grid; every replica searches the same haystacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import deepspeed
import torch
from transformers import PreTrainedTokenizerBase

from ringflash.data.tokenizer import encoder
from ringflash.distributed.world import World, replica_ring
from ringflash.evaluation.haystack import Cell, Row, read_text, rows_of, search
from ringflash.models import RingCache
from ringflash.ring.cache_plan import CHUNK
from ringflash.ring.transport import ProcessRing
from ringflash.training.config import Config


@dataclass(frozen=True, eq=False)
class Needles:
    """The haystacks of a run, how often they are searched, and the ranks that search them."""

    every: int
    rows: list[Row]
    ring: ProcessRing
    chunk: int
    kernel: str
    world: World

    @classmethod
    def of(cls, config: Config, tokenizer: PreTrainedTokenizerBase, world: World) -> Needles | None:
        """The searches of a run's settings, or None. All ranks call this.

        Raises ConfigError, on every rank, for a text that cannot be read and a length that is too short.
        """
        length = config.data.sequence_length
        asked = config.evaluation.needle.of_length(length)
        if not asked.every:
            return None
        text = world.from_rank_0(lambda: read_text(asked))
        rows = rows_of(asked, text, encoder(tokenizer, config.data.tokenizer), config.seed)
        ring = replica_ring(world, config.parallel)
        chunk = max(2 * ring.size, min(CHUNK, length))  # the run has memory for `length` tokens at once
        return cls(asked.every, rows, ring, chunk, config.attention.kernel, world)

    @torch.no_grad()
    def search(self, engine: deepspeed.DeepSpeedEngine, rows: Iterable[Row] | None = None) -> list[Cell]:
        """The cells of rows (default: all), by the engine's weights as they are; the engine trains on.

        Raises ConfigError, on every rank, if the memory of any does not suffice.
        """
        model, cells = engine.module.model, []
        engine.eval()
        for row in self.rows if rows is None else rows:
            cache = RingCache(
                model, row.length, ring=self.ring, chunk=self.chunk, kernel=self.kernel, rope_length=row.length
            )
            self.world.check_room(f"evaluation.needle.lengths={row.length} tokens", cache.nbytes)
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
    """Values for the metrics: the means needle_found and needle_loss, and each cell's, such as needle_loss/4096-50."""
    found = {}
    for name, values in (("needle_found", [float(x.found) for x in cells]), ("needle_loss", [x.loss for x in cells])):
        found[name] = sum(values) / len(values)
        found |= {f"{name}/{x.length}-{x.depth}": value for x, value in zip(cells, values, strict=True)}
    return found
