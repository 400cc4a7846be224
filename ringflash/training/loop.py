"""The run, top to bottom: preflight, processes, model, data, steps, and the results of a complete run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import yaml
from transformers import PreTrainedModel

from ringflash.data import Corpus, Evaluated, load_corpora, stream
from ringflash.data.tokenizer import tokenizer_digest
from ringflash.distributed import launcher
from ringflash.distributed.parallel import LayoutChooser, layout_chooser
from ringflash.distributed.world import World, join
from ringflash.evaluation.haystack import heat_map
from ringflash.files import model_digest, write_atomically
from ringflash.layout import Layout
from ringflash.models import build_model
from ringflash.models.lora import CONFIG as ADAPTER_CONFIG
from ringflash.training import loss_plot, metrics, preflight, run_folder, stop, zero3
from ringflash.training.checkpoints import checkpoint
from ringflash.training.checkpoints.checkpoint import Best
from ringflash.training.config import Config
from ringflash.training.divergence import Divergence
from ringflash.training.engine import build_engine
from ringflash.training.evaluation import Evaluation, HeldOut
from ringflash.training.export import export, export_adapter, generation_file, rehearse
from ringflash.training.meter import Meter
from ringflash.training.needle import Needles
from ringflash.training.needle import record as needle_record
from ringflash.training.out_of_memory import explained
from ringflash.training.preflight import Job
from ringflash.training.step import MicroBatch, prepare, train_step


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


def fit(config: Config, resolved: str) -> bool:
    """Train as `config` says; `resolved` is the same as YAML, for the run's folder.

    Returns whether the run is complete: false if it was stopped before its last step.

    Raises ConfigError, naming the setting, for what cannot work, and DivergedError if training diverges.
    """
    job = preflight.check(config)
    world = join(job.config.parallel, config)
    torch.manual_seed(config.seed)
    needles = Needles.of(job.config, job.tokenizer, world)
    model = _build_model(job, world)
    training, held_out = _load_corpora(job.config, world)
    job = _with_steps(job, training, world)
    config = job.config
    meter = Meter(model, config.optim.batch * config.data.sequence_length, world)
    run = _open(job, world, model, _settings(job, resolved, training, world), resolved)

    layout_for = _layout_chooser(run)
    evaluation = None
    if held_out is not None:
        length = config.data.sequence_length
        evaluation = Evaluation(config.evaluation, held_out, length, world, layout_for, config.pair_loss)
    _evaluate_first(run, evaluation, needles)
    best = _best(run, evaluation)
    divergence = Divergence(world, run.metrics)
    done = saved = run.start
    timer = checkpoint.Timer(config.checkpoint.every_minutes, world)
    with contextlib.closing(_batches(run, training, layout_for)) as batches:
        for step in range(run.start + 1, config.optim.total_steps + 1):
            if _out_of_patience(run, best, done):
                break
            world.watchdog.step = step
            meter.start()
            micro_batches, _ = next(batches)
            _seed_dropout(config.seed, step, world)
            with explained(config.memory, world.size):
                record = meter.record(train_step(run.engine, micro_batches, world))
            if evaluation is not None and _due(step, config.evaluation.every):
                record |= evaluation.loss(run.engine).record()
            if needles is not None and (_due(step, needles.every) or step == config.optim.total_steps):
                record |= _search(run, needles, step)
            if run.metrics is not None:
                run.metrics.log(step, record)
                run.metrics.show(step, record)
            stopping = stop.requested(world) and step < config.optim.total_steps
            done = step
            if not divergence.finite(step, record):
                continue
            if best is not None and "held_out_loss" in record:
                best = best.after(step, record["held_out_loss"])
            due = _due(step, config.checkpoint.every) or timer.due()
            if stopping or due or (best is not None and best.step == step):
                run.save(step, best)
                timer.restart()
                saved = step
            if stopping:
                _stop(run, step)
                return False
    _finish(run, evaluation, divergence, best, done, saved)
    return True


def _layout_chooser(run: Run) -> LayoutChooser:
    """The function that returns each step's layout. It prints the reasons of its choices."""
    config, world = run.job.config, run.world
    return layout_chooser(
        config.parallel,
        run.job.model_config,
        config.data.sequence_length,
        world.ring.size,
        world.broadcast(launcher.local_world_size()),  # all ranks of a ring must choose alike, even if machines differ
        run.metrics.write_line if run.metrics else lambda reason: None,
    )


def _batches(
    run: Run, training: Corpus, layout_for: LayoutChooser
) -> Generator[tuple[list[MicroBatch], dict[str, Any]]]:
    """This replica's micro-batches of every step, beginning with the first step of this run, and the data's state."""
    config, world = run.job.config, run.world
    share = config.optim.batch // world.replicas
    return stream(
        training,
        seed=config.data.seed,
        batch_size=config.optim.batch,
        length=config.data.sequence_length,
        rows=range(world.replica * share, (world.replica + 1) * share),
        start_step=run.start,
        prepare=lambda batch: prepare(run.engine, batch, world, layout_for, config.pair_loss),
    )


def _evaluate_first(run: Run, evaluation: Evaluation | None, needles: Needles | None) -> None:
    """Evaluate the model before the first step. A resumed run evaluates only a part, to find failures early."""
    record: dict[str, float] = {}
    if evaluation is not None and run.metrics is not None and evaluation.left_out:
        count, names = run.job.config.evaluation.sequences, ", ".join(evaluation.left_out)
        run.metrics.write_line(
            f"evaluation.sequences={count} have none of {names}: raise it to evaluate on all sources"
        )
    if evaluation is not None:
        before = evaluation.loss(run.engine, sequences=1 if run.start else None)
        record |= before.record()
        if run.metrics is not None and not run.start:
            run.metrics.write_line(f"held-out loss {before.loss:.4f} before the first step")
    if needles is not None and run.start:
        needles.search(run.engine, needles.first())
    elif needles is not None:
        record |= _search(run, needles, 0)
    if run.metrics is not None and record and not run.start:
        run.metrics.log(0, record)


def _search(run: Run, needles: Needles, step: int) -> dict[str, float]:
    """Search for needles, draw the heat map, and return the record."""
    with explained(run.job.config.memory, run.world.size):
        cells = needles.search(run.engine)
    if run.metrics is not None:
        run.metrics.draw(step, "needle", heat_map(cells))
        run.metrics.write_line(f"needles {sum(cell.found for cell in cells)} of {len(cells)} found at step {step}")
    return needle_record(cells)


def _seed_dropout(seed: int, step: int, world: World) -> None:
    """Give each rank other random numbers in each step, for its own tokens; a resumed run draws the same."""
    drawn = np.random.SeedSequence([seed, step, world.rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(drawn[0]))


def _shard_tokens(config: Config, world: World) -> int:
    """Tokens that this rank holds of a micro-batch."""
    ulysses = 1 if world.ulysses is None else world.ulysses.size
    layout = Layout.zigzag(config.data.sequence_length, world.ring.size, ulysses)
    return config.optim.micro_batch * layout.shard_length // ulysses


def _log(world: World) -> Callable[[str], None]:
    """A function that prints a line on the first rank."""
    return functools.partial(print, flush=True) if world.is_first else lambda message: None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _source(config: Config) -> str:
    return f"model.path={config.model.path}" if config.model.path else "model.architecture"


def _build_model(job: Job, world: World) -> PreTrainedModel:
    """Build the model, and rehearse its export on rank 0: before tokenising, which may take hours."""
    config = job.config
    with world.without_timeout(f"building the model of {_source(config)}"):
        makers = (zero3.random_model, zero3.pretrained_model) if config.memory.zero == 3 else None
        model = build_model(config.model, makers)
        if world.is_first:
            generation = generation_file(config.model.path)
            rehearse(model, job.tokenizer, generation, Path(config.output_dir), _source(config))
    return model


def _load_corpora(config: Config, world: World) -> tuple[Corpus, Evaluated | None]:
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


def _with_steps(job: Job, training: Corpus, world: World) -> Job:
    """The job with optim.epochs converted to steps."""
    config = job.config
    if config.optim.epochs is None:
        return job
    optim = config.optim.of_epoch(training.epoch_length(config.data.sequence_length))
    if world.is_first:
        print(f"steps      {optim.total_steps:,}, which are {config.optim.epochs:g} epochs", flush=True)
    return job._replace(config=dataclasses.replace(config, optim=optim))


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
        found = model_digest(Path(config.model.lora.path), ADAPTER_CONFIG) if world.is_first else None
        settings["model"]["lora"]["digest"] = world.broadcast(found)
    return settings


def _open(job: Job, world: World, model: PreTrainedModel, settings: dict[str, Any], resolved: str) -> Run:
    """Open the run's folder, and load its newest checkpoint."""
    config = job.config
    with world.without_timeout("initialising DeepSpeed"), explained(config.memory, world.size):
        engine = build_engine(model, config.optim, config.memory, world, config.attention, config.fused)
    with world.without_timeout("pinning host memory"):
        engine.module.reserve_host_memory(_shard_tokens(config, world), _log(world))
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


def _best(run: Run, evaluation: Evaluation | None) -> Best | None:
    """With checkpoint.keep_best, the lowest held-out loss of the run's checkpoints."""
    if evaluation is None or not run.job.config.checkpoint.keep_best:
        return None
    return checkpoint.find_best(run.checkpoints, evaluation.identity, run.world)


def _out_of_patience(run: Run, best: Best | None, step: int) -> bool:
    """Whether the run ends after `step`, since evaluation.patience evaluations have not lowered the held-out loss."""
    patience = run.job.config.evaluation.patience
    if best is None or patience is None or best.evaluations < patience:
        return False
    if run.metrics is not None:
        run.metrics.write_line(f"ends after step {step}: {patience} evaluations did not lower the held-out loss")
    return True


def _finish(
    run: Run, evaluation: Evaluation | None, divergence: Divergence, best: Best | None, steps: int, saved: int
) -> None:
    """End a run after `steps` steps: write a last checkpoint, the exported model, the held-out loss and the plot.

    best: whose weights are exported, if it is not None. saved: the step of the newest checkpoint.
    """
    config, world = run.job.config, run.world
    held_out = evaluation.loss(run.engine) if evaluation is not None else None
    divergence.check_end(steps, None if held_out is None else held_out.loss)
    before = best
    if best is not None and held_out is not None and held_out.loss < best.loss:
        best = best.after(steps, held_out.loss)
    if saved < steps or best != before:  # the checkpoint of the lowest loss has that loss
        run.save(steps, best)
    if best is not None and best.step != steps:
        checkpoint.load_best(run.engine, run.checkpoints, best, world)
    exported = _export(run)
    with world.without_timeout("finishing the loss plot and wandb's run"):
        if run.metrics is not None:
            of_tokens = evaluation if config.pair_loss is None else None
            entropy = of_tokens.corpus.unigram_entropy() if of_tokens is not None else None
            run.metrics.conclude(steps, {} if held_out is None else held_out.record(), entropy)
            _print_outcome(run.folder, exported, held_out, entropy, config.evaluation.needle.every > 0, best)
    _leave(world)


def _stop(run: Run, step: int) -> None:
    """End a run that was asked to stop after `step`, whose checkpoint is written."""
    with run.world.without_timeout("finishing wandb's run"):
        if run.metrics is not None:
            run.metrics.close(exit_code=1, preempted=True)
            print(
                f"stopped by {stop.SIGNAL.name} after step {step} of {run.job.config.optim.total_steps}; resume=auto "
                f"continues there, and resume=auto optim.steps={step} exports the model as it is",
                flush=True,
            )
    _leave(run.world)


def _leave(world: World) -> None:
    """Disconnect from the other ranks."""
    world.watchdog.close()  # before any rank, and the store with it, is gone
    dist.barrier()
    dist.destroy_process_group()


def _export(run: Run) -> list[Path]:
    """The folders of the trained model, and of its adapters where there are any."""
    config, tokenizer, written = run.job.config.model, run.job.tokenizer, []
    if config.lora.enabled:
        written.append(export_adapter(run.engine, run.folder / "adapter", config, tokenizer, run.world))
    if config.lora.merge:
        model = run.folder / "model"
        written.append(export(run.engine, model, tokenizer, run.world, generation_file(config.path)))
    return written


def _print_outcome(
    folder: Path,
    exported: list[Path],
    held_out: HeldOut | None,
    entropy: float | None,
    searched: bool,
    best: Best | None,
) -> None:
    """Print the held-out loss and the paths of all results."""
    unit = "token" if held_out is None else held_out.unit
    if held_out is not None:
        print(f"held-out loss     {held_out.loss:.4f} nats per {unit}")
        rewards = {name.removeprefix("rewards/"): x for name, x in held_out.rewards.items()}
        parts = {"by position": held_out.by_position, "by source": held_out.by_source, "rewards": rewards}
        for part, means in parts.items():
            if means:
                print(f"  {part:<15} {', '.join(f'{name}: {x:.4f}' for name, x in means.items())}")
    if entropy is not None:
        print(f"unigram entropy   {entropy:.4f} nats per token of the same text: a model that ignores context")
    if best is not None:
        print(f"lowest            {best.loss:.4f} nats per {unit} after step {best.step}, whose weights are exported")
    for path in exported:
        print(f"{path.name:<17} {path}")
    print(f"loss plot         {loss_plot.plot(folder, entropy, unit)}")
    if searched:
        print(f"needles           {folder / 'needle.png'}")
    print(f"metrics           {folder / metrics.FILE}")
    print(f"checkpoints       {folder / 'checkpoints'}")
    print(f"configuration     {folder / 'config.yaml'}", flush=True)
