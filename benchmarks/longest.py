"""One training step at a length that barely fits one GPU, checked against a shorter one.

    python benchmarks/longest.py --tokens 512 --first 128 --warm 64 model=tiny-llama model.dtype=bf16   # seconds
    python benchmarks/longest.py                                       # 1048576 tokens, one H200: 15 minutes
    python benchmarks/longest.py experiment=llama3-8b-400k --tokens 409600      # 8B parameters, one H200: 7 minutes

Settings after the options are those of train.py; experiment=1m is underneath. Weights and tokens are random.

1. Three steps of --warm tokens compile the kernels and initialise the optimizer.
2. A forward computes the loss of the first --first tokens alone.
3. One step trains on --tokens tokens, one causal document. Its loss over the first --first tokens must equal that of 2,
   since the weights are the same. The exit code is 1 if the two differ by more than 1e-4, or if loss or norm are not
   finite.

Lines show the progress of the GPU. For shells with a time limit, `setsid nohup ... &` keeps it running. MFU counts
visible (query, key) pairs, and not recomputation.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import RESULTS, card, write_json
from benchmarks.training import batch, composed
from ringflash.data import Batch
from ringflash.distributed.parallel import layout_chooser
from ringflash.distributed.world import World, join
from ringflash.models import build_model
from ringflash.ring.cost import peak_flops
from ringflash.training.config import Config
from ringflash.training.engine import build_engine
from ringflash.training.flops import matmul_parameters, step_flops
from ringflash.training.meter import memory_gib
from ringflash.training.out_of_memory import explained
from ringflash.training.step import StepResult, prepare, train_step

EXPERIMENT = ("experiment=1m", "data=text", "data.path=.", "data.tokenizer=.")
ALLOWED = 1e-4  # of the loss, between the two forwards of the first tokens
SECONDS = 20.0  # between lines of progress


class Progress:
    """Counts the layers that the GPU has started, forward and again in the backward, and prints the count regularly."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.on_gpu = device.type == "cuda"
        self.begun: list[Any] = []
        for layer in self.layers:
            layer.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.begun.append(torch.cuda.current_stream().record_event() if self.on_gpu else None)

    def line(self) -> str:
        """The number of layers that have started."""
        done = sum(1 for event in self.begun if event is None or event.query())
        half = len(self.layers)
        return f"forward of layer {done} of {half}" if done <= half else f"backward of layer {2 * half - done + 1}"

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Print a line every SECONDS."""
        self.begun, over, start = [], threading.Event(), time.perf_counter()

        def show() -> None:
            while not over.wait(SECONDS):
                print(f"{time.perf_counter() - start:6.0f} s  {self.line()}", flush=True)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class FirstLoss:
    """The mean loss of the first `count` tokens that the loss head computes."""

    def __init__(self, head: nn.Module, count: int) -> None:
        self.count, self.loss = count, torch.tensor(math.nan)
        head.register_forward_pre_hook(self._measure)

    @torch.no_grad()
    def _measure(self, head: Any, args: tuple[Tensor, ...]) -> None:
        hidden, labels = args[0][:, : self.count], args[1][:, : self.count]
        if hidden.shape[1] == self.count:
            self.loss = type(head).forward(head, hidden, labels) / self.count


def run(args: argparse.Namespace, config: Config, world: World) -> dict[str, Any]:
    """Run the three parts, and return their results."""
    torch.manual_seed(config.seed)
    with world.device:
        model = build_model(config.model)
    weights = matmul_parameters(model)
    engine = build_engine(model, config.optim, config.memory, world, config.attention, config.fused)
    engine.module.reserve_host_memory(args.tokens, lambda line: print(line, flush=True))
    progress, first = Progress(model, world.device), FirstLoss(model.lm_head, args.first)

    def step(data: Batch) -> StepResult:
        return train_step(engine, prepared(engine, data, config, world), world)

    for seed in range(3):
        print(f"step of {args.warm} tokens: loss {step(batch('causal', args.warm, args.vocabulary, seed)).loss:.4f}")
    whole = batch("causal", args.tokens, args.vocabulary, seed=3)
    start = Batch(whole.tokens[:, : args.first], whole.labels[:, : args.first], [[args.first]])
    engine.eval()
    with torch.no_grad():
        engine(**prepared(engine, start, config, world)[0].inputs)
    engine.train()
    alone = first.loss.item()
    print(f"the first {args.first} tokens alone: loss {alone:.6f}", flush=True)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    with progress.shown(), explained(config.memory, 1):
        result = step(whole)
        loss = result.loss.item()
    seconds, peak = time.perf_counter() - begun, peak_flops(world.device)
    flops = step_flops(weights, args.tokens, result.attention_flops.item())
    return {
        "tokens": args.tokens, "seconds": seconds, "tokens_per_second": args.tokens / seconds,
        "mfu": None if peak is None else flops / seconds / peak, "memory_gib": memory_gib(world.device),
        "host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "loss": loss,
        "gradient_norm": float(result.gradient_norm), "first": args.first, "first_loss_alone": alone,
        "first_loss_in_step": first.loss.item(),
    }  # fmt: skip


def prepared(engine: deepspeed.DeepSpeedEngine, data: Batch, config: Config, world: World) -> list[Any]:
    """The batch's only micro-batch, planned."""
    layouts = layout_chooser(config.parallel, engine.module.model.config, world.ring.size, 1)
    return prepare(engine, data, world, layouts)


def failures(found: dict[str, Any]) -> list[str]:
    """The failures of a run, one line each."""
    wrong = [f"{name} is {found[name]}" for name in ("loss", "gradient_norm") if not math.isfinite(found[name])]
    alone, inside = found["first_loss_alone"], found["first_loss_in_step"]
    if not abs(alone - inside) <= ALLOWED * alone:
        wrong.append(f"the first {found['first']} tokens: loss {alone} alone, {inside} in the step")
    return wrong


def main() -> int:
    """Measure, print, write. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1048576, help="of the step (%(default)s)")
    parser.add_argument("--first", type=int, default=131072, help="tokens whose loss is compared (%(default)s)")
    parser.add_argument("--warm", type=int, default=32768, help="tokens of each step before it (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "longest.json", help="JSON file (%(default)s)")
    args, rest = parser.parse_known_args()
    if not 0 < args.first <= args.tokens or not 0 < args.warm <= args.tokens:
        parser.error(f"--first {args.first} and --warm {args.warm} must be 1 to --tokens {args.tokens}")
    config = composed(parser, [*EXPERIMENT, *rest], args.tokens)
    world = join(config.parallel)
    if world.size > 1:
        parser.error(f"this is a benchmark of one process, here are {world.size}")
    facts = card(world.device, {}, None)
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", flush=True)
    args.vocabulary = config.model.architecture["vocab_size"]
    found = run(args, config, world)
    write_json(args.out, {"card": facts, "settings": rest, "run": found})
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
    wrong = failures(found)
    print(*(f"WRONG: {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    world.watchdog.close()
    torch.distributed.destroy_process_group()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
