"""One optimizer step: shard the global batch, and run it through model, loss and DeepSpeed.

DeepSpeed sees plain data parallelism over all ranks and averages their gradients. A rank's loss is therefore

    local_sum * ranks / valid_tokens

with valid_tokens counted over all ranks and all micro-batches. The average over ranks, summed over micro-batches, is
then the gradient of the mean loss per predicted token, however unevenly the labels are distributed over shards. With
preferences, pairs are counted instead of tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

from ringflash.data.batches import Batch
from ringflash.data.records import IGNORE
from ringflash.distributed.parallel import LayoutChooser
from ringflash.distributed.world import World
from ringflash.models import ring_inputs
from ringflash.models.layers import layer_kinds
from ringflash.ring.plan import AttentionPlan
from ringflash.training import positions
from ringflash.training.flops import BACKWARD, attention_flops, state_flops
from ringflash.training.neftune import Neftune
from ringflash.training.preferences import preference_loss
from ringflash.training.preferences.preference_loss import PreferencePairs


class StepResult(NamedTuple):
    """The results of a step.

    loss: float64 scalar, the mean loss per predicted token or pair, over all ranks. gradient_norm: of all weights,
    before clipping; not finite if the update was skipped. learning_rate: of this step. pairs, attention_flops: float64
    scalars, the (query, key) pairs that attention computed over all ranks and layers, and its operations with those of
    linear attention, including the backward. imbalance: those operations of the busiest rank of this ring relative to
    the mean, minus 1, in the worst micro-batch. by_position, preferences: the totals of the losses of tokens or
    of pairs, over all ranks.
    """

    loss: Tensor
    gradient_norm: Tensor | float
    learning_rate: float
    pairs: Tensor
    attention_flops: Tensor
    imbalance: float
    by_position: Tensor
    preferences: Tensor


class MicroBatch(NamedTuple):
    """This rank's shard of a micro-batch.

    inputs: the model's keyword arguments. pairs, attention_flops: the (query, key) pairs that attention computes in all
    layers, and the operations for them and for linear attention.
    """

    inputs: dict[str, Any]
    pairs: int
    attention_flops: float


def prepare(
    engine: deepspeed.DeepSpeedEngine,
    batch: Batch,
    world: World,
    layout_for: LayoutChooser,
    neftune: Neftune | None = None,
) -> list[MicroBatch]:
    """The micro-batches of a step for train_step, with their layouts and plans, including those of windowed layers.

    This takes the host seconds for many ranks, so a thread may do it during the step before. batch: this replica's
    sequences of the step, not sharded. layout_for: returns a mask's layout. neftune: makes the noise of embeddings.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # in this thread; else memory would be pinned through the first GPU
    micro_batches = batch.split(engine.train_micro_batch_size_per_gpu())
    config, forward_only = engine.module.model.config, engine.module.forward_only
    shards = [shard(engine, rows, world, layout_for) for rows in micro_batches]
    for inputs, rows in zip(shards, micro_batches, strict=True):
        if neftune is not None:
            inputs["noise"] = neftune.noise(rows, inputs["plan"])
    return [MicroBatch(inputs, *_work(config, inputs["plan"], forward_only)) for inputs in shards]


def train_step(engine: deepspeed.DeepSpeedEngine, micro_batches: list[MicroBatch], world: World) -> StepResult:
    """Run one optimizer step on the micro-batches that `prepare` made.

    All ranks skip the update if the gradient norm, or a micro-batch's loss on any rank, is not finite.
    """
    valid = world.sum(torch.stack([_counted(micro.inputs) for micro in micro_batches]).sum()).clamp(min=1)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    learning_rate = engine.learning_rate(engine.global_steps + 1)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    router_weight = valid / (len(micro_batches) * world.replicas)  # the mean over micro-batches, times `valid`
    of_tokens, of_pairs = positions.no_totals(world.device), preference_loss.no_totals(world.device)
    for micro in micro_batches:
        loss = forward(engine, micro.inputs, of_tokens, of_pairs, router_weight=router_weight)
        # 0 * loss makes all gradients NaN if the loss is not finite, without a host synchronisation.
        engine.backward(loss * (world.size / valid + 0 * loss.detach()), scale_wrt_gas=False)
        engine.step()
        total += loss.detach()
    work = [(micro.pairs, micro.attention_flops) for micro in micro_batches]
    pairs, flops = torch.tensor(work, dtype=torch.float64, device=world.device).T
    neighbours = 1 if world.ulysses is None else world.ulysses.size  # these compute the same pairs for other heads
    loss, all_pairs, all_flops = world.sum(
        torch.stack([total / valid, pairs.sum() / neighbours, flops.sum() / neighbours])
    )
    return StepResult(
        loss=loss,
        gradient_norm=engine.get_global_grad_norm(),
        learning_rate=learning_rate,
        pairs=all_pairs,
        attention_flops=all_flops,
        imbalance=_imbalance(flops, world),
        by_position=world.sum(of_tokens),
        preferences=world.sum(of_pairs),
    )


def forward(
    engine: deepspeed.DeepSpeedEngine, inputs: dict[str, Any], of_tokens: Tensor, of_pairs: Tensor, **options: Any
) -> Tensor:
    """The summed loss of this rank's inputs, whose parts are added to the totals of tokens or of pairs."""
    pairs: PreferencePairs | None = inputs.get("preferences")
    if pairs is None:
        return engine(**inputs, by_position=positions.by_position(inputs, of_tokens), **options)
    loss = engine(**inputs, **options)
    of_pairs += pairs.totals
    return loss


def _counted(inputs: dict[str, Any]) -> Tensor:
    """The tokens, or the pairs, whose losses this rank sums."""
    pairs: PreferencePairs | None = inputs.get("preferences")
    return (inputs["shift_labels"] != IGNORE).sum() if pairs is None else pairs.totals[1, 0]


def _work(config: PreTrainedConfig, plan: AttentionPlan, forward_only: int) -> tuple[int, float]:
    """(query, key) pairs that this rank computes, over batch rows and layers, and the operations of all its layers.

    forward_only: first layers that run no backward.
    """
    pairs, flops = 0, 0.0
    without_backward = layer_kinds(config, forward_only)
    for kind, layers in layer_kinds(config).items():
        of_call = sum(hop.pairs for hops in kind.plan(plan).hops for hop in hops)
        pairs += layers * of_call
        flops += attention_flops((layers - BACKWARD * without_backward.get(kind, 0)) * of_call, kind.heads)
    # All ranks have the same part of linear attention: that of some heads.
    return pairs, flops + state_flops(config, plan.batch * plan.layout.length / plan.ring.size, forward_only)


def _imbalance(work: Tensor, world: World) -> float:
    """Work [micro-batches] of the busiest rank of this ring relative to the mean, minus 1, in the worst micro-batch."""
    most, total = work.clone(), work.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group=world.ring.group)
    dist.all_reduce(total, group=world.ring.group)
    return float((most * world.ring.size / total.clamp(min=1)).max()) - 1


def shard(engine: deepspeed.DeepSpeedEngine, batch: Batch, world: World, layout_for: LayoutChooser) -> dict[str, Any]:
    """This rank's inputs of the model for a batch. layout_for: returns a mask's layout."""
    # Ranks drew the same batch from the same seed, so there is nothing to compare; the ring may be in use by a step.
    inputs = ring_inputs(
        batch.tokens, shift_labels=batch.labels, documents=batch.documents, ring=world.ring, ulysses=world.ulysses,
        layout=layout_for, config=engine.module.model.config, compare_ranks=False,
    )  # fmt: skip
    if engine.module.pair_loss is not None:
        inputs["preferences"] = PreferencePairs.of(engine.module.pair_loss, batch, inputs["plan"])
    return inputs
