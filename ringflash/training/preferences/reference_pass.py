"""The pass before training that computes the reference's log-probabilities, with the weights that training starts from.

It runs before a checkpoint is loaded, so a resumed run may complete it too, with more steps or without its file.
Sequences are packed as in training. Replicas share them, and rank 0 alone reads and writes the file.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import deepspeed
import torch
from tqdm import tqdm

from ringflash.data import Corpus, prefetch
from ringflash.data.batches import Batch
from ringflash.data.mixture import first_epoch
from ringflash.data.packing import Packed
from ringflash.data.pairs import digests
from ringflash.distributed.parallel import LayoutChooser
from ringflash.distributed.world import World
from ringflash.errors import ConfigError
from ringflash.training import stop
from ringflash.training.checkpoints.manifest import all_gathered
from ringflash.training.config import Config
from ringflash.training.evaluation import SEED, Evaluation
from ringflash.training.out_of_memory import explained
from ringflash.training.preferences import reference
from ringflash.training.preferences.reference import LogProbabilities, reference_path
from ringflash.training.step import MicroBatch, prepare

SECONDS = 60.0  # between two writes of the file


def compute_reference(
    engine: deepspeed.DeepSpeedEngine,
    config: Config,
    training: Corpus,
    evaluation: Evaluation | None,
    world: World,
    layout_for: LayoutChooser,
) -> bool:
    """Fill the reference of the engine's loss, if it has one, for all pairs that the run reads; all ranks call this.

    Returns false if a signal stopped it: the same command continues. Raises ConfigError for weights that give a number
    that is not finite.
    """
    if engine.module.pair_loss is None or (known := engine.module.pair_loss.reference) is None:
        return True
    trained, length = config.optim.total_steps * config.optim.batch, config.data.sequence_length
    read = [partial(training.packed, config.data.seed, i, length) for i in first_epoch(training, trained, length)]
    if evaluation is not None:
        read += [partial(evaluation.corpus.packed, SEED, i, length) for i in evaluation.numbers]
    with world.without_timeout(f"reading the pairs, and model.path={config.model.path} for its digest"):
        found = _work(config, read) if world.is_first else None
    path, before, lacking = world.broadcast(found)
    known |= before
    share = config.optim.micro_batch * world.replicas
    groups = [lacking[i : i + share] for i in range(0, len(lacking), share)]

    def make(group: list[int]) -> list[MicroBatch]:
        own = group[world.replica :: world.replicas] or group[:1]  # every rank takes part in ZeRO's exchanges
        return prepare(engine, Batch.of([read[i]() for i in own]), world, layout_for)

    engine.eval()
    saved = time.monotonic()
    bar = tqdm(desc="reference", total=len(lacking), unit="sequence", disable=not (world.is_first and lacking))
    with bar, explained(config.memory, world.size), contextlib.closing(prefetch(make, groups)) as made:
        for group, micro_batches in zip(groups, made, strict=True):
            known |= _finite(all_gathered(_log_probabilities(engine, micro_batches), world), config)
            bar.update(len(group))
            stopping = stop.requested(world) and group is not groups[-1]
            if world.is_first and (stopping or group is groups[-1] or time.monotonic() - saved > SECONDS):
                reference.write(path, known)
                saved = time.monotonic()
            if stopping and world.is_first:
                bar.write(f"stopped by {stop.SIGNAL.name} before the first step; the same command continues")
            if stopping:
                return False
    engine.train()
    world.watchdog.drain()  # its exchanges are in no step's record
    return True


def _work(config: Config, read: Sequence[Callable[[], Packed]]) -> tuple[Path, LogProbabilities, list[int]]:
    """The file, what it holds, and the numbers in `read` of sequences with pairs that it lacks; prints how many."""
    path = reference_path(config.data.cache, config.model)
    known = reference.read(path)
    pairs: set[bytes] = set()
    lacking = []
    for i, packed in enumerate(read):
        own = {*digests(*packed())}
        if own - known.keys() - pairs:
            lacking.append(i)
        pairs |= own
    computed = f"{len(pairs - known.keys()):,} of {len(pairs):,} pairs are computed before the first step"
    print(f"reference  {computed}, in {len(lacking):,} sequences; kept in {path}", flush=True)
    return path, known, lacking


@torch.no_grad()
def _log_probabilities(engine: deepspeed.DeepSpeedEngine, micro_batches: list[MicroBatch]) -> LogProbabilities:
    """log p of both answers of each pair, by its digest."""
    found: LogProbabilities = {}
    for micro in micro_batches:
        values = engine(**micro.inputs, only_log_probabilities=True)
        found |= zip(micro.inputs["preferences"].digests, values.tolist(), strict=True)
    return found


def _finite(found: LogProbabilities, config: Config) -> LogProbabilities:
    """The numbers of all ranks. Raises ConfigError, on every rank, if one is not finite."""
    if not all(math.isfinite(x) for values in found.values() for x in values):
        raise ConfigError(
            f"model.path={config.model.path} gives an answer a log-probability that is not finite: it cannot be the "
            f"reference of preference.precompute_ref_log_probs=true"
        )
    return found
