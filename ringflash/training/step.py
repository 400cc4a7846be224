"""One optimizer step: the global batch is sharded and goes through model, loss and DeepSpeed.

DeepSpeed sees plain data parallelism over all ranks and averages their gradients. A rank's loss is therefore

    local_sum * ranks / valid_tokens

with valid_tokens counted over all ranks and all micro-batches. The average over ranks, summed over micro-batches, is
then the gradient of the mean loss per predicted token, however unevenly labels are distributed over shards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

from ringflash.data.batches import Batch
from ringflash.data.records import IGNORE
from ringflash.layout import Layout
from ringflash.mask import IntervalMask
from ringflash.models import layer_kinds, ring_inputs
from ringflash.ring.plan import AttentionPlan
from ringflash.training.flops import attention_flops
from ringflash.training.positions import ByPosition, no_totals
from ringflash.training.world import World

Layouts = Callable[[IntervalMask], Layout]


class StepResult(NamedTuple):
    """The results of a step.

    loss, pairs, attention_flops: float64 scalars, the same on all ranks: the mean loss per predicted token, the
    (query, key) pairs that attention computed, over all sequences and layers, and the operations that these need,
    backward too. gradient_norm: of all weights, before clipping; not finite where the update was skipped.
    learning_rate: of this step. imbalance: attention's operations of the busiest rank of this ring over the mean of its
    ranks, minus 1, in the worst micro-batch. by_position: as `ByPosition` has totals, of all ranks.
    """

    loss: Tensor
    gradient_norm: Tensor | float
    learning_rate: float
    pairs: Tensor
    attention_flops: Tensor
    imbalance: float
    by_position: Tensor


class MicroBatch(NamedTuple):
    """This rank's shard of a micro-batch: the model's inputs.

    pairs, attention_flops: of (query, key), computed in all layers, and the operations that they need.
    """

    inputs: dict[str, Any]
    pairs: int
    attention_flops: float


def prepare(engine: deepspeed.DeepSpeedEngine, batch: Batch, world: World, layout_for: Layouts) -> list[MicroBatch]:
    """The micro-batches of a step for train_step, with their layouts and plans, also those of windowed layers.

    This is work of the host, seconds for many ranks, so a thread may do it during the step before. batch: this
    replica's sequences of the step, not sharded. layout_for: gives a mask its layout.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # in this thread; else memory would be pinned through the first GPU
    micro_batches = batch.split(engine.train_micro_batch_size_per_gpu())
    config = engine.module.model.config
    shards = [shard(rows, world, layout_for, config) for rows in micro_batches]
    return [MicroBatch(inputs, *_work(config, inputs["plan"])) for inputs in shards]


def train_step(engine: deepspeed.DeepSpeedEngine, micro_batches: list[MicroBatch], world: World) -> StepResult:
    """Run one optimizer step on the micro-batches that `prepare` made.

    All ranks skip the update if the gradient norm, or a micro-batch's loss on any rank, is not finite.
    """
    valid = world.sum(sum((inputs["shift_labels"] != IGNORE).sum() for inputs, *_ in micro_batches)).clamp(min=1)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    learning_rate = engine.learning_rate(engine.global_steps + 1)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    router_weight = valid / (len(micro_batches) * world.replicas)  # the mean over micro-batches, times `valid`
    by_position = no_totals(world.device)
    for inputs, *_ in micro_batches:
        loss = engine(**inputs, router_weight=router_weight, by_position=ByPosition.of(inputs, by_position))
        # 0 * loss makes all gradients NaN where the loss is not finite, without a host synchronisation.
        engine.backward(loss * (world.size / valid + 0 * loss.detach()), scale_wrt_gas=False)
        engine.step()
        total += loss.detach()
    pairs, operations = torch.tensor([work for _, *work in micro_batches], dtype=torch.float64, device=world.device).T
    neighbours = 1 if world.ulysses is None else world.ulysses.size  # these compute the same pairs for other heads
    sums = world.sum(torch.stack([total / valid, pairs.sum() / neighbours, operations.sum() / neighbours]))
    norm, imbalance = engine.get_global_grad_norm(), _imbalance(operations, world)
    loss, computed, needed = sums
    return StepResult(loss, norm, learning_rate, computed, needed, imbalance, world.sum(by_position))


def _work(config: PreTrainedConfig, plan: AttentionPlan) -> tuple[int, float]:
    """(query, key) pairs that this rank computes, over batch rows and layers, and the operations that they need."""
    pairs, operations = 0, 0.0
    for kind, layers in layer_kinds(config).items():
        found = layers * sum(hop.pairs for hops in kind.plan(plan).hops for hop in hops)
        pairs += found
        operations += attention_flops(found, kind.heads)
    return pairs, operations


def _imbalance(work: Tensor, world: World) -> float:
    """Work [micro-batches] of the busiest rank of this ring over the mean, minus 1, in the worst micro-batch."""
    most, of_all = work.clone(), work.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group=world.ring.group)
    dist.all_reduce(of_all, group=world.ring.group)
    return float((most * world.ring.size / of_all.clamp(min=1)).max()) - 1


def shard(batch: Batch, world: World, layout_for: Layouts, config: PreTrainedConfig) -> dict[str, Any]:
    """The inputs of this rank's model for a batch; layout_for: gives a mask its layout."""
    # Ranks made the same batch from the same seed, and the ring may be in use by the step before.
    return ring_inputs(
        batch.tokens, shift_labels=batch.labels, documents=batch.documents, ring=world.ring, ulysses=world.ulysses,
        layout=layout_for, config=config, compare_ranks=False,
    )  # fmt: skip
