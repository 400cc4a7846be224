"""One optimizer step: the global batch, sharded, through model, loss and DeepSpeed.

DeepSpeed sees plain data parallelism over all ranks and averages their gradients. A rank's loss is therefore

    local_sum * ranks / valid_tokens

with valid_tokens counted over all ranks and the whole accumulation window: the average over ranks, summed over
micro-batches, is the gradient of the mean loss per predicted token, however unevenly labels fall on shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ringflash.data.batches import Batch
from ringflash.data.packing import IGNORE
from ringflash.errors import ConfigError
from ringflash.layout import Layout
from ringflash.mask import IntervalMask
from ringflash.models import AttentionConfig, windows_of_layers
from ringflash.models.ring_mask import RingMask
from ringflash.ring.plan import AttentionPlan
from ringflash.training.loss import LossHead
from ringflash.training.optimizer import OptimConfig, build_optimizer, start_moments
from ringflash.training.world import World

Layouts = Callable[[IntervalMask], Layout]


@dataclass(frozen=True)
class MemoryConfig:
    """What is traded for memory, in the order it pays."""

    zero: int = 1
    """DeepSpeed ZeRO stage: shard over ranks nothing (0), optimizer (1), gradients too (2), weights too (3)."""

    recompute: bool = False
    """Keep each layer's input and attention's result only, and compute the rest again in the backward."""

    loss_tile: int = 2048
    """Tokens whose logits exist at once."""

    def __post_init__(self) -> None:
        if self.zero not in (0, 1, 2, 3):
            raise ConfigError(f"memory.zero={self.zero} is not one of 0, 1, 2, 3")
        if self.loss_tile < 1:
            raise ConfigError(f"memory.loss_tile={self.loss_tile} must be 1 or more")


class TrainedModel(nn.Module):
    """A causal language model that returns its summed loss, so that DeepSpeed's hooks see one call."""

    def __init__(self, model: PreTrainedModel, memory: MemoryConfig, attention: AttentionConfig) -> None:
        super().__init__()
        self.model = model
        self.attention = asdict(attention)
        softcap = getattr(model.config, "final_logit_softcapping", None)
        model.lm_head = LossHead(model.lm_head, memory.loss_tile, softcap)
        if memory.recompute:
            model.gradient_checkpointing_enable()

    def forward(self, tokens: Tensor, labels: Tensor, position_ids: Tensor, plan: AttentionPlan) -> Tensor:
        """Summed loss of this rank's shard: tokens, labels, position_ids int64 [B, S]."""
        hidden = self.model.base_model(
            input_ids=tokens,
            attention_mask=RingMask(tokens.shape),
            position_ids=position_ids,
            plan=plan,
            use_cache=False,
            **self.attention,
        ).last_hidden_state
        return self.model.lm_head(hidden, labels)


def build_engine(
    model: PreTrainedModel,
    optim: OptimConfig,
    memory: MemoryConfig,
    world: World,
    attention: AttentionConfig | None = None,
) -> deepspeed.DeepSpeedEngine:
    """The model under DeepSpeed, with AdamW and its schedule.

    Raises ConfigError for bf16 at ZeRO 0 with accumulation: DeepSpeed would sum the micro-batches' gradients in bf16.
    """
    bf16, accumulation = model.dtype == torch.bfloat16, optim.accumulation(world.replicas)
    if bf16 and memory.zero == 0 and accumulation > 1:
        raise ConfigError(
            f"memory.zero=0 with bf16 weights would accumulate {accumulation} micro-batches in bf16; "
            f"set memory.zero=1, model.dtype=fp32 or a larger optim.micro_batch"
        )
    # On the CPU, DeepSpeed would compile an op that serves inference only, for half a minute, under a lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(verbose=False)
    trained = TrainedModel(model, memory, attention or AttentionConfig())
    whole_fp32 = memory.zero == 0 and not bf16
    settings = {
        "train_micro_batch_size_per_gpu": optim.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if whole_fp32 else optim.clip,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and memory.zero == 0 else "fp32"},
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": memory.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=trained, optimizer=build_optimizer(trained, optim, whole_fp32), config=settings
    )
    if bf16 and memory.zero == 0:
        start_moments(engine)
    engine.learning_rate = optim.learning_rate
    return engine


class StepResult(NamedTuple):
    """What a step came to.

    loss, pairs: float64 scalars, alike on all ranks: the mean loss per predicted token, and the (query, key) pairs that
    attention computed, over all sequences and layers. gradient_norm: of all weights, before clipping; not finite where
    the update was skipped. learning_rate: the one of this step. imbalance: how far the busiest rank of this ring is
    above the mean in pairs, in the worst micro-batch.
    """

    loss: Tensor
    gradient_norm: Tensor | float
    learning_rate: float
    pairs: Tensor
    imbalance: float


class MicroBatch(NamedTuple):
    """This rank's of a micro-batch: what its model takes, and the (query, key) pairs it computes in all layers."""

    inputs: dict[str, Any]
    pairs: int


def prepare(engine: deepspeed.DeepSpeedEngine, batch: Batch, world: World, layout_for: Layouts) -> list[MicroBatch]:
    """What train_step takes of a step, by micro-batch: layouts and plans are made here, windows of layers among them.

    That is the host's work, seconds where ranks are many, so a thread may do it while the step before is computed.
    batch: this replica's sequences of the step, in whole. layout_for: gives a mask its layout.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # of this thread: memory would be pinned through the first GPU
    parts = [_shard(part, world, layout_for) for part in batch.split(engine.train_micro_batch_size_per_gpu())]
    return [MicroBatch(inputs, _pairs(engine.module.model.config, inputs["plan"])) for inputs in parts]


def train_step(engine: deepspeed.DeepSpeedEngine, micro_batches: list[MicroBatch], world: World) -> StepResult:
    """Run one optimizer step on what `prepare` made of it.

    The update is skipped, on all ranks alike, if the gradient norm or a micro-batch's loss on any rank is not finite.
    """
    valid = world.sum(sum((inputs["labels"] != IGNORE).sum() for inputs, _ in micro_batches)).clamp(min=1)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    learning_rate = engine.learning_rate(engine.global_steps + 1)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    for inputs, _ in micro_batches:
        loss = engine(**inputs)
        # 0 * loss: a loss that is not finite makes the gradients NaN, where they might be finite, without a host sync.
        engine.backward(loss * (world.size / valid + 0 * loss.detach()), scale_wrt_gas=False)
        engine.step()
        total += loss.detach()
    mine = torch.tensor([pairs for _, pairs in micro_batches], dtype=torch.float64, device=world.device)
    neighbours = 1 if world.ulysses is None else world.ulysses.size  # they compute the same pairs, for other heads
    loss, computed = world.sum(torch.stack([total / valid, mine.sum() / neighbours]))
    return StepResult(loss, engine.get_global_grad_norm(), learning_rate, computed, _imbalance(mine, world))


def _pairs(config: PreTrainedConfig, plan: AttentionPlan) -> int:
    """(query, key) pairs that this rank computes, over batch rows and layers."""
    windows = windows_of_layers(config)
    plans = [(plan if window is None else plan.window(window - 1), layers) for window, layers in windows]
    return sum(layers * hop.pairs for seen, layers in plans for hops in seen.hops for hop in hops)


def _imbalance(pairs: Tensor, world: World) -> float:
    """How far the busiest rank of this ring is above the mean in pairs [micro-batches], in the worst of them."""
    most, of_all = pairs.clone(), pairs.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group=world.ring.group)
    dist.all_reduce(of_all, group=world.ring.group)
    return float((most * world.ring.size / of_all.clamp(min=1)).max()) - 1


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, batches: Iterable[Batch], world: World, layout_for: Layouts) -> float:
    """Mean loss per predicted token over batches, each given to every ring in whole."""
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in batches:
        inputs = _shard(batch, world, layout_for)
        total[0] += engine(**inputs)
        total[1] += (inputs["labels"] != IGNORE).sum()
    engine.train()
    loss, valid = world.sum(total).tolist()
    return loss / max(valid, 1)


def _shard(batch: Batch, world: World, layout_for: Layouts) -> dict:
    """What this rank's model takes of a batch."""
    mask = batch.mask()
    plan = AttentionPlan(mask, layout_for(mask), world.ring, world.ulysses)
    return {
        "tokens": plan.shard(batch.tokens),
        "labels": plan.shard(batch.labels, padding=IGNORE),
        "position_ids": plan.position_ids(len(batch.tokens)),
        "plan": plan,
    }
