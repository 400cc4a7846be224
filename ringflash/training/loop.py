"""The run, top to bottom: processes, data, model, steps, checkpoints, evaluation, export."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from ringflash.data import load_corpus, load_tokenizer, sequences_per_epoch, stream
from ringflash.data.batches import batch as make_batch
from ringflash.data.corpus import TokenCorpus
from ringflash.errors import ConfigError
from ringflash.models import build_model, check_kernel, check_length, read_config
from ringflash.ring.cost import peak_flops
from ringflash.training import checkpoint, flops, metrics, run_folder
from ringflash.training.config import Config
from ringflash.training.divergence import Divergence
from ringflash.training.export import export, generation_file, rehearse
from ringflash.training.files import model_digest, write_whole
from ringflash.training.parallel import layout_chooser, resolve_parallel
from ringflash.training.step import Layouts, build_engine, evaluate, prepare, train_step
from ringflash.training.world import World, first_here, join, ranks_here, world_size


def check_here(config: Config) -> None:
    """Raise ConfigError for what a run would refuse of the model, as far as this machine can tell.

    Where there is a GPU, a run would be on such a one. Where there is none, this may well be a cluster's login node:
    whether attention.kernel can run is then left to the run, whose device and whose dtype=auto are not known here.
    """
    model_config = read_config(config.model)
    check_length(config.model, model_config, config.data.sequence_length)
    if torch.cuda.is_available():
        check_kernel(config.model, config.attention, model_config, torch.device("cuda"))


def fit(config: Config, resolved: str) -> None:
    """Train as `config` says; `resolved` is the same as YAML, for the run's folder.

    Raises ConfigError, naming the key, for whatever cannot work.
    """
    model_config = read_config(config.model)
    length = config.data.sequence_length
    check_length(config.model, model_config, length)
    parallel, why = resolve_parallel(config.parallel, model_config, length, world_size(), ranks_here())
    config = dataclasses.replace(config, parallel=parallel)
    config.check(world_size())
    world = join(parallel)
    check_kernel(config.model, config.attention, model_config, world.device)
    torch.manual_seed(config.seed)

    source = f"model.path={config.model.path}" if config.model.path else "model.architecture"
    with world.own_pace(f"building the model of {source}"):
        tokenizer, generation = load_tokenizer(config.data), generation_file(config.model.path)
        model = build_model(config.model)  # first, so that a broken folder is found before hours of tokenising
        if world.is_first:
            rehearse(model, tokenizer, generation, Path(config.output_dir), source)
    training, held_out = _corpora(config, world)
    _check_vocabulary(config, training, model.config.vocab_size)
    _check_length(config, training, *([held_out] if config.data.held_out else []))
    ranks_per_node = world.broadcast(ranks_here())  # all ranks of a ring must choose alike, also where machines differ
    log = None
    layout_for = layout_chooser(
        parallel,
        model_config,
        length,
        world.ring.size,
        ranks_per_node,
        lambda why: log.write_line(why) if log else None,
    )
    speed = _Speed(model, config, world)
    with world.own_pace("giving the model to DeepSpeed"):
        engine = build_engine(model, config.optim, config.memory, world, config.attention)
    settings = yaml.safe_load(resolved)
    settings["data"]["digest"] = training.digest  # so that a run is not resumed on other text of the same name
    if config.model.path:
        with world.own_pace(f"reading {source} for its digest"):
            found = model_digest(Path(config.model.path)) if world.is_first else None
        settings["model"]["digest"] = world.broadcast(found)
    with world.own_pace(f"taking a folder in output_dir={config.output_dir}"):
        run = run_folder.take(Path(config.output_dir), config.name, config.resume) if world.is_first else None
    folder = world.broadcast(run and run.path)
    start = checkpoint.resume(engine, folder / "checkpoints", world, settings)
    run_folder.check_start(folder, start)
    if start > config.optim.steps:
        raise ConfigError(f"optim.steps={config.optim.steps} is less than the {start} steps that {folder} has done")

    with world.own_pace(f"opening {folder} and wandb's run"):
        if world.is_first:
            write_whole(folder / "config.yaml", resolved)
            carrier = f"parallel: a ring of {world.ring.size}, its messages by {world.ring.carrier}"
            print(*filter(None, [speed.summary(), why, carrier if world.ring.size > 1 else None]), sep="\n", flush=True)
            log = metrics.Metrics(config.logger, folder, settings, start, config.optim.steps)
    divergence = Divergence(world, log)
    if config.data.held_out:  # tried before the first step, not only after the last
        _held_out_loss(engine, held_out, config, world, layout_for, count=1)
        world.watch.take()
    share = config.optim.batch // world.replicas
    batches = stream(
        training,
        seed=config.data.seed,
        batch_size=config.optim.batch,
        length=config.data.sequence_length,
        rows=range(world.replica * share, (world.replica + 1) * share),
        start_step=start,
        prepare=lambda batch: prepare(engine, batch, world, layout_for),
    )
    for step in range(start + 1, config.optim.steps + 1):
        begun = time.perf_counter()
        world.watch.step = step
        micro_batches, _ = next(batches)
        result = train_step(engine, micro_batches, world)
        record = {
            "loss": result.loss.item(),
            "gradient_norm": float(result.gradient_norm),
            "lr": result.learning_rate,
            **speed.record(result.pairs.item(), time.perf_counter() - begun),
            **_traffic_record(world, result.imbalance),
        }
        if config.data.held_out and _due(step, config.evaluation.every):
            record["held_out_loss"] = _held_out_loss(engine, held_out, config, world, layout_for)
            world.watch.take()  # the next step's record is of that step alone
        if log is not None:
            log.log(step, record)
            log.show(step, record)
        if divergence.finite(step, record) and _due(step, config.checkpoint.every):
            checkpoint.save(engine, folder / "checkpoints", step, world, config.checkpoint.keep, settings)
    batches.close()
    _finish(
        engine, config, world, layout_for, folder, tokenizer, generation, held_out, start, log, settings, divergence
    )


def _finish(
    engine, config, world, layout_for, folder, tokenizer, generation, held_out, start, log, settings, divergence
) -> None:
    """What a complete run leaves: a last checkpoint, the exported model, the held-out loss and the plot."""
    loss = _held_out_loss(engine, held_out, config, world, layout_for) if config.data.held_out else None
    divergence.check_end(config.optim.steps, loss)
    if start < config.optim.steps and not _due(config.optim.steps, config.checkpoint.every):
        checkpoint.save(engine, folder / "checkpoints", config.optim.steps, world, config.checkpoint.keep, settings)
    exported = export(engine, folder / "model", tokenizer, world, generation)
    with world.own_pace("finishing the loss plot and wandb's run"):
        if log is not None:
            _conclude(log, folder, exported, held_out, loss, config.optim.steps)
    world.watch.close()  # before any rank, and the store with it, is gone
    dist.barrier()
    dist.destroy_process_group()


def _conclude(log: metrics.Metrics, folder: Path, exported: Path, held_out, loss: float | None, step: int) -> None:
    """The last record, of `step`, the plot, and what there is to be seen where."""
    entropy, losses = None, ""
    if loss is not None:
        entropy = held_out.unigram_entropy()
        # A complete run that is resumed has this record, unless it was killed after its last checkpoint.
        if not any(record["step"] == step and "unigram_entropy" in record for record in metrics.read(log.path)):
            log.log(step, {"held_out_loss": loss, "unigram_entropy": entropy})
        losses = (
            f"held-out loss     {loss:.4f} nats per token\n"
            f"unigram entropy   {entropy:.4f} nats per token of the same text: a model that ignores context\n"
        )
    log.close()
    print(
        f"{losses}"
        f"model             {exported}\n"
        f"loss plot         {metrics.plot(folder, entropy)}\n"
        f"metrics           {log.path}\n"
        f"checkpoints       {folder / 'checkpoints'}\n"
        f"configuration     {folder / 'config.yaml'}",
        flush=True,
    )


class _Speed:
    """Tokens a second, model FLOPs utilisation and memory of each step."""

    def __init__(self, model, config: Config, world: World) -> None:
        self.model_config = model.config
        self.weights = flops.matmul_parameters(model)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.config, self.world = config, world
        self.tokens = config.optim.batch * config.data.sequence_length
        self.peak = peak_flops(world.device)

    def summary(self) -> str:
        """What is about to run."""
        world, config = self.world, self.config
        where = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        return (
            f"{self.model_config.model_type}, {self.parameters / 1e6:,.1f}M parameters, on {world.size} x {where}\n"
            f"{config.optim.steps} steps of {config.optim.batch} x {config.data.sequence_length:,} tokens, "
            f"{world.replicas} replicas x {world.ring.size} ranks of a ring x {config.parallel.ulysses} of Ulysses, "
            f"{config.parallel.layout} layout, ZeRO {config.memory.zero}"
        )

    def record(self, pairs: float, seconds: float) -> dict[str, float]:
        """The step's figures, over all ranks; pairs: of (query, key), over all sequences and layers."""
        record = {
            "tokens_per_second": self.tokens / seconds,
            "seconds": seconds,
            "pairs": pairs,
            "memory_gib": metrics.memory_gib(self.world.device),
        }
        if self.peak is not None:
            done = flops.step_flops(self.model_config, self.weights, self.tokens, pairs)
            record["mfu"] = done / seconds / (self.peak * self.world.size)
        return record


def _traffic_record(world: World, imbalance: float) -> dict[str, float]:
    """What was exchanged since the last call: wait, hops and imbalance of the rank that has most; GiB of all ranks.

    Called where the step's loss has been read, so that what the GPU waited is known.
    """
    taken = world.watch.take()
    ring, ulysses = taken["ring"], taken["ulysses"]
    received = torch.tensor([ring.bytes, ulysses.bytes], dtype=torch.float64, device=world.device)
    ring_gib, ulysses_gib = (world.sum(received) / 2**30).tolist()
    most = torch.tensor([ring.seconds, ulysses.seconds, ring.exchanges, imbalance], dtype=torch.float64)
    ring_wait, ulysses_wait, hops, imbalance = world.max(most.to(world.device)).tolist()
    record = {"ring_wait_seconds": ring_wait, "ring_gib": ring_gib, "ring_hops": int(hops), "imbalance": imbalance}
    if world.ulysses is not None:
        record |= {"ulysses_wait_seconds": ulysses_wait, "ulysses_gib": ulysses_gib}
    return record


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _held_out_loss(
    engine, corpus: TokenCorpus, config: Config, world: World, layout_for: Layouts, count: int | None = None
) -> float:
    """Mean loss over the first `count` held-out sequences (evaluation.sequences), the same ones at every evaluation."""
    batches = [
        make_batch(corpus, seed=0, step=i, batch_size=1, length=config.data.sequence_length)
        for i in range(count or config.evaluation.sequences)
    ]
    return evaluate(engine, batches, world, layout_for)


def _corpora(config: Config, world: World) -> tuple[TokenCorpus, TokenCorpus]:
    """Training and held-out documents; rank 0 tokenises, then one rank per other machine checks what it finds there."""
    with world.own_pace(f"tokenising data.path={config.data.path}"):
        if world.is_first:
            load_corpus(config.data)
    with world.own_pace(f"checking the tokens of data.path={config.data.path} in data.cache={config.data.cache}"):
        if first_here() and not world.is_first:
            load_corpus(config.data)
    with world.own_pace(f"reading the tokens of data.path={config.data.path} in data.cache={config.data.cache}"):
        return load_corpus(config.data, verify=False)


def _check_vocabulary(config: Config, corpus: TokenCorpus, vocab_size: int) -> None:
    if corpus.tokenizer_size > vocab_size:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} has {corpus.tokenizer_size} tokens, more than the model's "
            f"model.architecture.vocab_size={vocab_size}"
        )


def _check_length(config: Config, *corpora: TokenCorpus) -> None:
    for corpus in corpora:
        sequences_per_epoch(corpus, config.data.sequence_length)
