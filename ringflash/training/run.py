"""Run: what steps share with the end of a run, and how one is opened: model, corpora, folder, newest checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import yaml
from transformers import PreTrainedModel

from ringflash.data import Corpus, Evaluated, load_corpora
from ringflash.data.tokenizer import tokenizer_digest
from ringflash.distributed import launcher
from ringflash.distributed.world import World
from ringflash.files import model_digest, write_atomically
from ringflash.models import build_model
from ringflash.models.lora import CONFIG as ADAPTER_CONFIG
from ringflash.training import loss_plot, metrics, run_folder, zero3
from ringflash.training.checkpoints import checkpoint
from ringflash.training.checkpoints.checkpoint import Best
from ringflash.training.config import Config
from ringflash.training.engine import build_engine
from ringflash.training.export import rehearse
from ringflash.training.out_of_memory import explained
from ringflash.training.preferences.preference_loss import PreferenceLoss
from ringflash.training.preflight import Job, shard_tokens


@dataclass(frozen=True)
class Run:
    """The state that steps share with the end of a run. start: steps done before. locked, metrics: only on rank 0."""

    job: Job
    world: World
    engine: deepspeed.DeepSpeedEngine
    settings: dict[str, Any]
    locked: run_folder.RunFolder | None  # its lock is held while this lives
    folder: Path
    start: int
    metrics: metrics.Metrics | None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def save(self, step: int, best: Best | None) -> None:
        """Write the checkpoint of a step."""
        keep = self.job.config.checkpoint.keep
        checkpoint.save(self.engine, self.checkpoints, step, self.world, keep, self.settings, best)


def make_model(job: Job, world: World) -> PreTrainedModel:
    """Build the model, and rehearse its export on rank 0: before tokenising, which may take hours."""
    config = job.config
    with world.without_timeout(f"building the model of {_source(config)}"):
        makers = (zero3.random_model, zero3.pretrained_model) if config.memory.zero == 3 else None
        model = build_model(config.model, makers)
        if world.is_first:
            rehearse(model, job.tokenizer, config.model.path, Path(config.output_dir))
    return model


def read_corpora(config: Config, world: World) -> tuple[Corpus, Evaluated | None]:
    """Training and held-out documents. Rank 0 tokenises; then one rank of each other machine verifies the cache."""
    source = f"data.path={config.data.path}" if config.data.path else f"data.sources {', '.join(config.data.sources)}"
    with world.without_timeout(f"tokenising {source}"):
        if world.is_first:
            load_corpora(config.data)
    cached = f"the tokens of {source} in data.cache={config.data.cache}"
    with world.without_timeout(f"checking {cached}"):
        if launcher.local_rank() == 0 and not world.is_first:
            load_corpora(config.data)
    with world.without_timeout(f"reading {cached}"):
        training, held_out = load_corpora(config.data, verify=False)
    if world.is_first:
        corpora = (training,) if held_out is None else (training, held_out)
        lines = [line for corpus in corpora for line in corpus.description(config.data.sequence_length)]
        print(*lines, sep="\n", flush=True)
    return training, held_out


def with_steps(job: Job, training: Corpus, world: World) -> Job:
    """The job with optim.epochs converted to steps. Prints how often the run reads each source."""
    config, length = job.config, job.config.data.sequence_length
    optim = config.optim if config.optim.epochs is None else config.optim.of_epoch(training.epoch_length(length))
    if world.is_first and (lines := epochs_of(training.source_lengths(length), optim.total_steps * optim.batch)):
        print(f"steps      {optim.total_steps:,}, which are {lines}", flush=True)
    return job._replace(config=dataclasses.replace(config, optim=optim))


def epochs_of(lengths: dict[str, float], sequences: int) -> str:
    """The epochs of each source in a number of sequences; "" for no sources.

    >>> epochs_of({"books": 40.0, "web": 600.0}, 300)
    '7.5 epochs of books, 0.5 epochs of web'
    >>> epochs_of({"books": 40.0, "web": 40.0}, 100), epochs_of({"": 300.0}, 1000)
    ('2.5 epochs', '3.33 epochs')
    """
    shown = {name: f"{sequences / length:.3g} epochs" for name, length in lengths.items()}
    one = len({*shown.values()}) == 1
    return next(iter(shown.values())) if one else ", ".join(f"{epochs} of {name}" for name, epochs in shown.items())


def start_engine(job: Job, model: PreTrainedModel, world: World) -> deepspeed.DeepSpeedEngine:
    """The engine, with the weights that training starts from, and its host memory."""
    config = job.config
    with world.without_timeout("initialising DeepSpeed"), explained(config.memory, world.size):
        engine = build_engine(model, config.optim, config.memory, world, config.attention, config.fused)
    if (pair_loss := config.pair_loss) is not None:
        engine.module.pair_loss = PreferenceLoss(pair_loss, {} if pair_loss.precompute_ref_log_probs else None)
    with world.without_timeout("pinning host memory"):
        log = functools.partial(print, flush=True) if world.is_first else lambda line: None
        engine.module.reserve_host_memory(shard_tokens(config, world.size), log)
    return engine


def open_run(job: Job, world: World, engine: deepspeed.DeepSpeedEngine, training: Corpus, resolved: str) -> Run:
    """Open the run's folder, and load its newest checkpoint."""
    config, settings = job.config, _settings(job, resolved, training, world)
    with world.without_timeout(f"taking a folder in output_dir={config.output_dir}"):
        output_dir = Path(config.output_dir)
        locked = run_folder.acquire(output_dir, config.name, config.resume) if world.is_first else None
    folder = world.broadcast(locked and locked.path)
    with world.without_timeout(f"looking for {folder} on every machine"):
        if launcher.local_rank() == 0:
            run_folder.check_shared(folder, config.output_dir)
    start = checkpoint.resume(engine, folder / "checkpoints", world, settings)
    opened = None
    with world.without_timeout(f"opening {folder} and wandb's run"):
        if world.is_first:
            run_folder.check_start(folder, start, config.optim.total_steps)
            write_atomically(folder / "config.yaml", resolved)
            loss_plot.check_plot(folder)
            print(f"fused      {', '.join(engine.fused) or 'nothing'}", flush=True)
            if world.ring.size > 1:
                print(f"messages   in rings of {world.ring.size} ranks, carried by {world.ring.carrier}", flush=True)
            opened = metrics.Metrics(config.logger, folder, settings, start, config.optim.total_steps)
    return Run(job, world, engine, settings, locked, folder, start, opened)


def _settings(job: Job, resolved: str, training: Corpus, world: World) -> dict[str, Any]:
    """The settings, with digests of text, tokenizer and model, which must be the same when the run is resumed."""
    config, settings = job.config, yaml.safe_load(resolved)
    settings["data"]["digest"] = training.digest
    settings["tokenizer"] = {"digest": tokenizer_digest(job.tokenizer, config.data.chat)}
    if config.model.path:
        with world.without_timeout(f"reading {_source(config)} for its digest"):
            found = model_digest(Path(config.model.path)) if world.is_first else None
        settings["model"]["digest"] = world.broadcast(found)
    if not config.data.preferences:
        del settings["preference"], settings["data"]["preferences"]  # which checkpoints of runs without do not have
    if not config.model.lora.enabled:
        del settings["model"]["lora"]  # likewise
    elif config.model.lora.path:
        adapter = Path(config.model.lora.path)
        settings["model"]["lora"]["digest"] = world.from_rank_0(lambda: model_digest(adapter, ADAPTER_CONFIG))
    return settings


def _source(config: Config) -> str:
    return f"model.path={config.model.path}" if config.model.path else "model.architecture"
