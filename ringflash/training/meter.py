"""Meter: the figures of one step, over all ranks: loss, speed, model FLOPs utilisation, memory, traffic, imbalance."""

from __future__ import annotations

import resource
import time

import torch

from ringflash.distributed.world import World
from ringflash.ring.cost import peak_flops
from ringflash.training import flops, positions
from ringflash.training.config import Config
from ringflash.training.metrics import BY_POSITION
from ringflash.training.preferences import preference_loss
from ringflash.training.step import StepResult


class Meter:
    """Times steps and makes their records. All ranks make the same calls."""

    def __init__(self, model, config: Config, world: World) -> None:
        """model: the transformers model."""
        self.weights, self.frozen = (flops.matmul_parameters(model, frozen) for frozen in (False, True))
        self.forward_only = flops.forward_only_parameters(model)
        self.tokens, self.world = config.optim.batch * config.data.sequence_length, world
        self.reference = config.pair_loss is not None and config.pair_loss.runs_reference
        self.peak = peak_flops(world.device)
        self._begun = time.perf_counter()

    def start(self) -> None:
        """Start the step's clock."""
        self._begun = time.perf_counter()

    def record(self, result: StepResult) -> dict[str, float]:
        """The step's figures, by their names in metrics.jsonl. Reading the loss waits for the end of the step."""
        loss, pairs, attention = result.loss.item(), result.pairs.item(), result.attention_flops.item()
        seconds = time.perf_counter() - self._begun
        record = {
            "loss": loss,
            "gradient_norm": float(result.gradient_norm),
            "lr": result.learning_rate,
            "tokens_per_second": self.tokens / seconds,
            "seconds": seconds,
            "pairs": pairs,
            "predicted": round((result.by_position[1].sum() + result.preferences[1, 0]).item()),  # tokens, or pairs
        }
        if self.peak is not None:
            done = flops.step_flops(
                self.weights, self.tokens, attention, self.frozen, self.reference, self.forward_only
            )
            record["mfu"] = done / seconds / (self.peak * self.world.size)
        record |= {BY_POSITION + name: x for name, x in positions.means(result.by_position).items()}
        record |= preference_loss.means(result.preferences)
        return record | _of_ranks(self.world, result.imbalance)


def _of_ranks(world: World, imbalance: float) -> dict[str, float]:
    """Traffic since the last call, in GiB summed over ranks; the highest waits, hops, imbalance and memory of any rank.

    The step's loss must have been read before, so that the GPU's waits are complete.
    """
    drained = world.watchdog.drain()
    ring, ulysses = drained["ring"], drained["ulysses"]
    received = torch.tensor([ring.bytes, ulysses.bytes], dtype=torch.float64, device=world.device)
    ring_gib, ulysses_gib = (world.sum(received) / 2**30).tolist()
    own = [ring.seconds, ulysses.seconds, ring.exchanges, imbalance, memory_gib(world.device)]
    most = world.max(torch.tensor(own, dtype=torch.float64, device=world.device))
    ring_wait, ulysses_wait, hops, imbalance, memory = most.tolist()
    record = {"memory_gib": memory, "ring_wait_seconds": ring_wait, "ring_gib": ring_gib, "ring_hops": int(hops)}
    record["imbalance"] = imbalance
    if world.ulysses is not None:
        record |= {"ulysses_wait_seconds": ulysses_wait, "ulysses_gib": ulysses_gib}
    return record


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process since it began: the GPU's, or on the CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
