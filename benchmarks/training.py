"""Long training steps on one GPU: ringflash with any settings, and its peers in the same run.

    python benchmarks/training.py --tokens 256 --vocabulary 384 model=tiny-llama        # anywhere, in seconds
    python benchmarks/training.py                                                       # 131072 tokens, 3 minutes
    python benchmarks/training.py --masks packed --batches 10                           # ten fixed packed batches
    python benchmarks/training.py --tokens 32768 --variant ringflash: --variant transformers \\
        model=qwen3-30b-a3b model.architecture.num_hidden_layers=4                      # four layers of experts
    python benchmarks/training.py --variant plain:fused=never --variant fused: --variant transformers

Settings after the options are those of train.py, for every variant; experiment=qwen3-0.5b-128k is underneath. A
variant is NAME:SETTINGS, or a peer: transformers, transformers-flash or deepspeed (benchmarks/training_peers.py).
Peers support neither packed documents nor several GPUs. The tokens are random, so no variant needs data.path.

Under torchrun, the ranks share each sequence: tokens/s are those of all ranks, MFU and memory those of one. A thread
plans the next batches during a step, as in the trainer.

Every variant starts from the same weights and trains on the same tokens. Its first step, which compiles, has --warm
tokens. Packed batches have the lengths of files of Python's standard library. MFU counts visible (query, key) pairs,
and not recomputation. Each row is written as soon as it is measured: a run with the same --out continues where the last
one stopped. A picture of all rows is drawn next to the JSON. The exit code is 1 if a variant failed.

waits: seconds per step of exchanges between ranks that no computation hid. attention: seconds of a step's attention, as
the trainer predicts them to choose a layout.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import training_peers
from benchmarks.report import RESULTS, bars, card, drawn, print_written, signature, write_json
from ringflash.data import Batch, prefetch
from ringflash.distributed.launcher import local_world_size
from ringflash.distributed.parallel import layout_chooser
from ringflash.distributed.world import World, join
from ringflash.errors import ConfigError, in_one_line
from ringflash.layout import Layout
from ringflash.models import build_model
from ringflash.models.layers import layer_masks
from ringflash.ring.cost import Machine, peak_flops, predict
from ringflash.training.compose import compose
from ringflash.training.config import Config
from ringflash.training.engine import build_engine
from ringflash.training.flops import attention_flops, matmul_parameters, state_flops, step_flops
from ringflash.training.meter import memory_gib
from ringflash.training.step import MicroBatch, prepare, train_step

EXPERIMENT = ("experiment=qwen3-0.5b-128k", "data=stdlib", "parallel.ulysses=1")
MASKS = ("causal", "packed")
LEFT = 2**28  # bytes that earlier variants may leave: cuBLAS's workspace, 32 MiB, stays
CPU_TOKENS = 16384  # a longer sequence, of the models underneath, takes hours without a GPU
HEADER = (
    f"{'variant':<24} {'mask':<7} {'tokens':>8} {'seconds':>8} {'tok/s':>8} {'MFU':>6} {'GiB':>6} {'waits':>7} "
    f"{'attention':>9}  loss of steps"
)


@dataclass(frozen=True)
class Row:
    """One variant's steps on one kind of batch: seconds per step (the median), and the peak of memory.

    exposed_seconds, attention_seconds: a step's waits and its predicted attention, as in `Variant`.
    """

    variant: str
    settings: str
    mask: str
    tokens: int
    seconds: float
    all_seconds: list[float]
    tokens_per_second: float  # over all timed steps: total tokens / total seconds
    mfu: float | None  # likewise
    memory_gib: float
    losses: list[float]
    exposed_seconds: float = 0.0
    attention_seconds: float | None = None

    def __str__(self) -> str:
        mfu = "-" if self.mfu is None else f"{self.mfu:.3f}"
        losses = " ".join(f"{x:.5f}" for x in self.losses[:4])
        attention = "-" if self.attention_seconds is None else f"{self.attention_seconds:.3f}"
        return (
            f"{self.variant:<24} {self.mask:<7} {self.tokens:>8} {self.seconds:>8.3f} {self.tokens_per_second:>8.0f} "
            f"{mfu:>6} {self.memory_gib:>6.1f} {self.exposed_seconds:>7.3f} {attention:>9}  {losses}"
        )


class Variant(NamedTuple):
    """A model, the preparation of a batch in a thread, and the step, which reads the loss and is then complete.

    free: frees the variant's memory after measuring, which would otherwise be counted for the next variant. waits:
    seconds of exchanges, since the last call, that no computation hid, on the rank with most. predicted: seconds of a
    step's attention, as predicted for the choice of layouts; None if the device's speed is not known.
    """

    model: PreTrainedModel
    plan: Callable[[Batch], Any]
    step: Callable[[Any], float]
    free: Callable[[], None] = lambda: None
    waits: Callable[[], float] = lambda: 0.0
    predicted: Callable[[Any], float | None] = lambda planned: None


# -- batches


def documents(mask: str, tokens: int, seed: int) -> list[int]:
    """Lengths of a batch's documents: one, or those of the standard library's files in random order."""
    if mask == "causal":
        return [tokens]
    folder = Path(sysconfig.get_paths()["stdlib"])
    sizes = sorted(p.stat().st_size for p in folder.rglob("*.py") if "site-packages" not in p.parts)
    lengths = [size for size in sizes if size]
    random.Random(seed).shuffle(lengths)
    found: list[int] = []
    while sum(found) < tokens:
        found.append(min(lengths.pop(), tokens - sum(found)))
    return found


def batch(mask: str, tokens: int, vocabulary: int, seed: int) -> Batch:
    """One sequence of random tokens, the same for every variant."""
    lengths = documents(mask, tokens, seed)
    ids = torch.randint(1, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.roll(-1, dims=1)
    labels[0, torch.tensor(lengths).cumsum(0) - 1] = -100
    return Batch(ids, labels, [lengths])


# -- variants


def ringflash(config: Config, world: World, tokens: int) -> Variant:
    """The trainer's own step."""
    torch.manual_seed(config.seed)
    with world.device:  # random weights of half a billion parameters take the CPU 20 seconds
        model = build_model(config.model)
    engine = build_engine(model, config.optim, config.memory, world, config.attention, config.fused)
    ulysses = 1 if world.ulysses is None else world.ulysses.size
    engine.module.reserve_host_memory(Layout.zigzag(tokens, world.ring.size, ulysses).shard_length // ulysses)

    def plan(data: Batch) -> list[MicroBatch]:
        layout_for = layout_chooser(config.parallel, model.config, world.ring.size, local_world_size())
        return prepare(engine, data, world, layout_for)

    def waits() -> float:
        seconds = sum(traffic.seconds for traffic in world.watchdog.drain().values())
        return world.max(torch.tensor(seconds, device=world.device)).item()

    def predicted(planned: list[MicroBatch]) -> float | None:
        if peak_flops(world.device) is None:
            return None
        machine = Machine.of(world.device, config.parallel.intra_node_bandwidth_gb)
        return sum(
            number * predict(mask, micro.inputs["plan"].layout, heads.share(ulysses), machine)
            for micro in planned
            for mask, heads, number in layer_masks(model.config, micro.inputs["plan"].mask)
        )

    def free() -> None:
        # Through hooks on weights, DeepSpeed's engine refers to itself in ways that Python's collector cannot see.
        engine.destroy()
        for weight in model.parameters():
            weight.grad = None
            vars(weight).clear()

    return Variant(model, plan, lambda planned: train_step(engine, planned, world).loss.item(), free, waits, predicted)


# -- measuring


def measure(
    name: str, settings: Sequence[str], masks: Sequence[str], args: argparse.Namespace, world: World, keep: Callable
) -> None:
    """Rows of one variant, one per mask, each passed to `keep`.

    Raises RuntimeError if earlier variants left GPU memory allocated, which its peak would include.
    """
    left = torch.cuda.memory_allocated() if world.device.type == "cuda" else 0
    if left > LEFT:
        raise RuntimeError(f"{left / 2**30:.2f} GiB of the variants before it are still allocated: measure it alone")
    config, _ = compose([*EXPERIMENT, *args.settings, *settings])
    if name in training_peers.PEERS:
        if world.size > 1:
            raise ValueError(f"{name} takes one process, here are {world.size}")
        model, step = training_peers.build(name, config, world.device)
        variant = Variant(model, lambda data: data, step)
    else:
        variant = ringflash(config, world, args.tokens)
    try:
        _rows(name, settings, masks, args, world, keep, variant)
    finally:
        variant.free()


def _rows(
    name: str, settings: Sequence[str], masks: Sequence[str], args: argparse.Namespace, world: World, keep: Callable,
    variant: Variant,
) -> None:  # fmt: skip
    model, plan, step = variant[:3]
    vocabulary, weights = model.config.vocab_size, matmul_parameters(model)
    step(plan(batch("causal", args.warm, vocabulary, 99)))
    for mask in masks:
        batches = [batch(mask, args.tokens, vocabulary, seed) for seed in range(args.batches)]
        flops = [step_flops(weights, args.tokens, attention(model, data)) for data in batches]
        seconds, losses = [], []
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        planned = prefetch(plan, batches)
        ready = next(planned)  # which a thread plans during the step before, if there is one
        predictions: list[float | None] = []
        variant.waits()
        for _ in batches:
            begun = time.perf_counter()
            done = ready
            losses.append(step(ready))
            ready = next(planned, None)
            seconds.append(time.perf_counter() - begun)
            predictions.append(variant.predicted(done))
        peak = peak_flops(world.device)
        keep(
            Row(
                name, " ".join([*args.settings, *settings]), mask, args.tokens, statistics.median(seconds), seconds,
                args.tokens * len(batches) / sum(seconds),
                None if peak is None else sum(flops) / sum(seconds) / peak / world.size,
                memory_gib(world.device), losses, variant.waits() / len(batches),
                _mean(predictions),
            )
        )  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return statistics.mean(known) if known else None


def attention(model: PreTrainedModel, data: Batch) -> float:
    """Operations of attention on the pairs that a model's layers see, and of linear attention."""
    layers = layer_masks(model.config, data.mask())
    of_pairs = sum(count * attention_flops(mask.area(), heads) for mask, heads, count in layers)
    return of_pairs + state_flops(model.config, data.tokens.numel())


def draw(path: Path, rows: Sequence[dict[str, Any]], facts: dict[str, str]) -> None:
    """Tokens per second and peak memory: a panel each, a bar per variant, grouped by tokens and mask."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(f"{row['tokens']} {row['mask']}" for row in rows))
    figure = Figure(figsize=(max(7.0, 2.2 * len(groups) + 1), 6.5), layout="constrained")
    panels = (("tokens_per_second", "tokens/s", "{:.0f}"), ("memory_gib", "GiB at peak", "{:.1f}"))
    for axes, (key, label, form) in zip(figure.subplots(2, 1, sharex=True), panels, strict=True):
        found: dict[str, dict[str, float]] = {}
        for row in rows:
            found.setdefault(row["variant"], {})[f"{row['tokens']} {row['mask']}"] = row[key]
        bars(axes, groups, found, form)
        axes.set_ylabel(label)
    figure.axes[0].legend(fontsize=7, ncols=len(found), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(f"training steps, {signature(facts)}", fontsize=9)
    figure.savefig(path, dpi=130)


def composed(parser: argparse.ArgumentParser, settings: Sequence[str], tokens: int) -> Config:
    """The configuration; ends with one line for a setting that cannot be, and for a length that needs a GPU."""
    if tokens > CPU_TOKENS and not torch.cuda.is_available():
        parser.error(f"--tokens {tokens} needs a GPU, and here is none; --help names a command that runs anywhere")
    try:
        return compose([*settings])[0]
    except ConfigError as error:
        parser.error(str(error))


def main() -> int:
    """Measure every variant that has no row yet, and print the table. Returns the exit code: 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--masks", nargs="+", default=MASKS, choices=MASKS, help="of the sequences (both)")
    parser.add_argument("--batches", type=int, default=2, help="timed steps, each on its own batch (%(default)s)")
    parser.add_argument("--warm", type=int, default=8192, help="tokens of the first step, not timed (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=151936, help="of the model (%(default)s)")
    parser.add_argument("--variant", action="append", help="NAME:SETTINGS or a peer; several times for several")
    parser.add_argument("--out", type=Path, default=RESULTS / "training.json", help="JSON file (%(default)s)")
    args, rest = parser.parse_known_args()
    args.settings = [f"model.architecture.vocab_size={args.vocabulary}", *rest]
    args.warm = min(args.warm, args.tokens)
    config = composed(parser, [*EXPERIMENT, *args.settings], args.tokens)
    world = join(config.parallel)
    failed = False
    contents: dict[str, Any] = {"card": card(world.device, {}, None), "rows": []}
    if args.out.exists():
        contents["rows"] = json.loads(args.out.read_text())["rows"]
    if world.is_first:
        print(*(f"{name}: {value}" for name, value in contents["card"].items()), sep="\n")
        print(HEADER, flush=True)

    def keep(row: Row) -> None:
        if world.is_first:
            print(row, flush=True)
            contents["rows"].append(asdict(row))
            write_json(args.out, contents)

    for variant in args.variant or ["ringflash:"]:
        name, _, settings = variant.partition(":")
        done = [row["mask"] for row in contents["rows"] if (row["variant"], row["tokens"]) == (name, args.tokens)]
        possible = ("causal",) if name in training_peers.PEERS else MASKS
        masks = [mask for mask in args.masks if mask in possible and mask not in done]
        if not masks:
            continue
        try:
            measure(name, settings.split(), masks, args, world, keep)
        except Exception as error:
            failed = True
            rank = "" if world.is_first else f"on rank {world.rank} "  # where rank 0 waits for this one
            print(f"{name:<24} {rank}failed: {type(error).__name__}: {in_one_line(error)[:300]}", flush=True)
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    if contents["rows"] and world.is_first:
        print_written(args.out, drawn(draw, args.out, contents["rows"], contents["card"]))
    world.watchdog.close()
    torch.distributed.destroy_process_group()
    return int(failed and world.is_first)  # torchrun ends all ranks as soon as one fails, and rank 0 draws


if __name__ == "__main__":
    sys.exit(main())
