"""The run, top to bottom: preflight, processes, model, data, steps, and the results of a complete run."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import numpy as np
import torch
from tqdm import tqdm

from ringflash.data import Corpus, stream
from ringflash.distributed import launcher
from ringflash.distributed.parallel import LayoutChooser, layout_chooser
from ringflash.distributed.world import World, join
from ringflash.evaluation.haystack import heat_map
from ringflash.training import finish, preflight, stop
from ringflash.training.checkpoints import checkpoint
from ringflash.training.checkpoints.checkpoint import Best
from ringflash.training.config import Config
from ringflash.training.divergence import Divergence
from ringflash.training.evaluation import Evaluation
from ringflash.training.meter import Meter
from ringflash.training.needle import Needles
from ringflash.training.needle import record as needle_record
from ringflash.training.neftune import Neftune
from ringflash.training.out_of_memory import explained
from ringflash.training.preferences.reference_pass import compute_reference
from ringflash.training.preflight import Job
from ringflash.training.run import Run, make_model, open_run, read_corpora, start_engine, with_steps
from ringflash.training.step import MicroBatch, prepare, train_step


def fit(config: Config, resolved: str) -> bool:
    """Train as `config` says; `resolved` is the same as YAML, for the run's folder.

    Returns whether the run is complete: false if it was stopped before its last step.

    Raises ConfigError, naming the setting, for what cannot work, and DivergedError if training diverges.
    """
    job = preflight.check(config)
    world = join(job.config.parallel, config)
    torch.manual_seed(config.seed)
    needles = Needles.of(job.config, job.tokenizer, world)
    model = make_model(job, world)
    training, held_out = read_corpora(job.config, world)
    job = with_steps(job, training, world)
    config = job.config
    meter = Meter(model, config, world)
    engine = start_engine(job, model, world)

    layout_for = _layout_chooser(job, world)
    evaluation = None
    if held_out is not None:
        evaluation = Evaluation(config.evaluation, held_out, config.data.sequence_length, world, layout_for)
    if not compute_reference(engine, config, training, evaluation, world, layout_for):
        finish.leave(world)
        return False
    run = open_run(job, world, engine, training, resolved)
    _evaluate_first(run, evaluation, needles)
    batches = _batches(run, training, layout_for)
    return _take_steps(run, batches, meter, evaluation, needles)


def _take_steps(
    run: Run,
    batches: Generator[list[MicroBatch]],
    meter: Meter,
    evaluation: Evaluation | None,
    needles: Needles | None,
) -> bool:
    """Take the steps of a run, and end it. Returns whether it is complete."""
    config, world = run.job.config, run.world
    best = None
    if evaluation is not None and config.checkpoint.keep_best:
        best = checkpoint.find_best(run.checkpoints, evaluation.identity, world)
    divergence = Divergence(world, run.metrics)
    done = saved = run.start
    timer = checkpoint.Timer(config.checkpoint.every_minutes, world)
    with contextlib.closing(batches):
        for step in range(run.start + 1, config.optim.total_steps + 1):
            if _out_of_patience(run, best, done):
                break
            world.watchdog.step = step
            meter.start()
            micro_batches = next(batches)
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
                if not record["predicted"]:
                    run.metrics.write_line(f"step {step}: no token of its batch has a label: it has no loss")
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
                finish.interrupt(run, step)
                return False
    finish.complete(run, evaluation, divergence, best, done, saved)
    return True


def _layout_chooser(job: Job, world: World) -> LayoutChooser:
    """The function that returns each step's layout. It prints the reasons of its choices, above a progress bar."""
    return layout_chooser(
        job.config.parallel,
        job.model_config,
        world.ring.size,
        world.broadcast(launcher.local_world_size()),  # all ranks of a ring must choose alike, even if machines differ
        tqdm.write if world.is_first else lambda reason: None,
    )


def _batches(run: Run, training: Corpus, layout_for: LayoutChooser) -> Generator[list[MicroBatch]]:
    """This replica's micro-batches of every step, beginning with the first step of this run."""
    config, world = run.job.config, run.world
    share = config.optim.batch // world.replicas
    neftune = Neftune(alpha, config.seed) if (alpha := config.model.neftune_alpha) else None
    return stream(
        training,
        seed=config.data.seed,
        batch_size=config.optim.batch,
        length=config.data.sequence_length,
        rows=range(world.replica * share, (world.replica + 1) * share),
        start_step=run.start,
        prepare=lambda batch: prepare(run.engine, batch, world, layout_for, neftune),
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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _out_of_patience(run: Run, best: Best | None, step: int) -> bool:
    """Whether the run ends after `step`, since evaluation.patience evaluations have not lowered the held-out loss."""
    patience = run.job.config.evaluation.patience
    if best is None or patience is None or best.evaluations < patience:
        return False
    if run.metrics is not None:
        run.metrics.write_line(f"ends after step {step}: {patience} evaluations did not lower the held-out loss")
    return True
