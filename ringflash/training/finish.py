"""The end of a run: a last checkpoint, the exported model, the held-out loss, and a summary of where results are."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from ringflash.distributed.world import World
from ringflash.training import loss_plot, metrics, stop
from ringflash.training.checkpoints import checkpoint
from ringflash.training.checkpoints.checkpoint import Best
from ringflash.training.divergence import Divergence
from ringflash.training.evaluation import Evaluation, HeldOut
from ringflash.training.export import export, export_adapter
from ringflash.training.run import Run


def complete(
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
            _print_outcome(run, exported, held_out, entropy, best)
    leave(world)


def interrupt(run: Run, step: int) -> None:
    """End a run that was asked to stop after `step`, whose checkpoint is written."""
    with run.world.without_timeout("finishing wandb's run"):
        if run.metrics is not None:
            run.metrics.close(exit_code=1, preempted=True)
            print(
                f"stopped by {stop.SIGNAL.name} after step {step} of {run.job.config.optim.total_steps}; resume=auto "
                f"continues there, and resume=auto optim.steps={step} exports the model as it is",
                flush=True,
            )
    leave(run.world)


def leave(world: World) -> None:
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
        length = run.job.config.data.sequence_length
        written.append(export(run.engine, run.folder / "model", tokenizer, run.world, config.path, length))
    return written


def _print_outcome(
    run: Run, exported: list[Path], held_out: HeldOut | None, entropy: float | None, best: Best | None
) -> None:
    """Print the held-out loss and the paths of all results."""
    folder, config = run.folder, run.job.config
    unit = "per pair" if config.data.preferences else "nats per token"  # not every loss of pairs is in nats
    if held_out is not None:
        print(f"held-out loss     {held_out.loss:.4f} {unit}")
        rewards = {name.removeprefix("rewards/"): x for name, x in held_out.rewards.items()}
        parts = {"by position": held_out.by_position, "by source": held_out.by_source, "rewards": rewards}
        for part, means in parts.items():
            if means:
                print(f"  {part:<15} {', '.join(f'{name}: {x:.4f}' for name, x in means.items())}")
    if entropy is not None:
        print(f"unigram entropy   {entropy:.4f} nats per token of the same text: a model that ignores context")
    if best is not None:
        print(f"lowest            {best.loss:.4f} {unit} after step {best.step}, whose weights are exported")
    for path in exported:
        print(f"{path.name:<17} {path}")
    print(f"loss plot         {loss_plot.plot(folder, entropy, unit)}")
    if config.evaluation.needle.every > 0:
        print(f"needles           {folder / 'needle.png'}")
    print(f"metrics           {folder / metrics.FILE}")
    print(f"checkpoints       {folder / 'checkpoints'}")
    print(f"configuration     {folder / 'config.yaml'}", flush=True)
