"""Engine: the model and its loss under DeepSpeed, with an optimizer.

DeepSpeed sees plain data parallelism over all ranks and averages their gradients; `step` scales the loss to match.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from ringflash.distributed.world import World
from ringflash.errors import ConfigError
from ringflash.models import AttentionConfig, FusedConfig, checkpoint_layers, fuse_layers, router_loss, tile_mlps
from ringflash.models.checkpointing import host_store
from ringflash.models.configuration import experts_of, logit_scale
from ringflash.models.freezing import forward_only_layers
from ringflash.models.lora import without_adapters
from ringflash.models.lora_experts import replace_experts
from ringflash.models.lora_linear import replace_adapted
from ringflash.models.mlp import leaf_modules, require_input_gradients
from ringflash.training.estimate import REDUCE_BUCKET, kept_sizes
from ringflash.training.loss import LossHead, LossOptions, Sums, tile_for
from ringflash.training.memory import MemoryConfig
from ringflash.training.neftune import EmbeddingNoise, noisy
from ringflash.training.optimizers import one_rank
from ringflash.training.optimizers.build import build_optimizer, start_moments
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.preferences.preference_loss import PreferenceLoss, PreferencePairs
from ringflash.training.zero3 import start_deepspeed


class TrainedModel(nn.Module):
    """A causal language model that returns its summed loss, so that DeepSpeed's hooks see one call."""

    def __init__(
        self, model: PreTrainedModel, memory: MemoryConfig, attention: AttentionConfig, fused_loss: bool = False
    ) -> None:
        super().__init__()
        self.model = model.train()  # transformers loads models for inference, whose layers are not recomputed
        self.attention = asdict(attention)
        tile = memory.loss_tile or tile_for(model.lm_head.out_features)
        softcap = getattr(model.config, "final_logit_softcapping", None)
        options = LossOptions(tile, softcap, logit_scale(model.config), fused_loss)
        model.lm_head = LossHead(model.lm_head, options)
        replace_adapted(model)
        replace_experts(model)
        if memory.recompute:
            checkpoint_layers(model, memory.keep)
            tile_mlps(model, memory.mlp_tile)
        self.memory, self.forward_only = memory, forward_only_layers(model)
        self.pair_loss: PreferenceLoss | None = None  # of batches of pairs
        self.host_states: Callable[[Callable[[str], None]], None] | None = None  # makes the optimizer's, if on the host

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights of a checkpoint, without frozen ones. DeepSpeed alone would store tied ones."""
        found = super().state_dict(*args, **options)
        frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        for name in [*found]:
            if name in frozen or f"{name.partition('.weight.')[0]}.weight" in frozen:  # or how it is quantized
                del found[name]
        return found

    def reserve_host_memory(self, tokens: int, log: Callable[[str], None] = lambda message: None) -> None:
        """Allocate and pin the host memory of the optimizer and of layers, for a rank's shard of `tokens` tokens.

        log: called with lines of progress. Raises ConfigError if this machine has too little memory.
        """
        if self.host_states is not None:
            self.host_states(log)
        store, config = host_store(self.model), self.model.config
        if store is None:
            return
        sizes = kept_sizes(config, self.memory.keep, tokens, self.model.dtype.itemsize, "host", self.forward_only)
        store.pool.reserve(sizes, "what layers keep", log)

    def forward(
        self,
        shift_labels: Tensor,
        labels: object,
        num_items_in_batch: object,
        router_weight: Tensor | None = None,
        by_position: Sums | None = None,
        preferences: PreferencePairs | None = None,
        only_log_probabilities: bool = False,
        noise: EmbeddingNoise | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Summed loss of this rank's shard, from the inputs of `ring_inputs`. `step` divides it by all ranks' labels.

        preferences: the pairs of this micro-batch, whose losses are summed instead of the tokens', in equal shares.
        only_log_probabilities: return those of their answers instead, float64 [pairs, 2].
        by_position: collects the tokens' losses. router_weight: the factor of the experts' load-balancing loss, which
        is added if the configuration has output_router_logits. Only its gradient is added: the returned value is the
        loss of the tokens or pairs alone. noise: of the embeddings, but not of the reference's.
        """
        config, inputs, head = self.model.config, inputs | self.attention, self.model.lm_head
        body: Any = self.model.base_model
        if body is self.model:  # Llama 4's class names a base model that it does not have
            body = self.model.model
        if preferences is not None and only_log_probabilities:
            return preferences.log_probabilities(head, body(**inputs).last_hidden_state, shift_labels)
        reference = None if preferences is None else preferences.reference
        if preferences is not None and preferences.pair_loss.config.runs_reference:
            with without_adapters(self.model):
                reference = preferences.log_probabilities(head, body(**inputs).last_hidden_state, shift_labels)
        routed = router_weight is not None and getattr(config, "output_router_logits", False)
        with noisy(self.model, noise):
            outputs = body(**inputs, **{"output_router_logits": True} if routed else {})
        if preferences is not None:
            loss = preferences.loss(head, outputs.last_hidden_state, shift_labels, reference)
        else:
            loss = head(outputs.last_hidden_state, shift_labels, by_position)
        if not routed:
            return loss
        share = router_loss(outputs.router_logits, experts_of(config)[1], inputs["plan"])
        added = config.router_aux_loss_coef * router_weight * share
        return loss + (added - added.detach())


def build_engine(
    model: PreTrainedModel,
    optim: OptimConfig,
    memory: MemoryConfig,
    world: World,
    attention: AttentionConfig | None = None,
    fused: FusedConfig | None = None,
) -> deepspeed.DeepSpeedEngine:
    """The model under DeepSpeed, with optimizer and schedule. All ranks call this.

    Its attribute `fused` lists the fused passes. Raises ConfigError for a pass that must be fused and cannot be.
    """
    start_deepspeed()
    fused = fused or FusedConfig()
    fused_loss, fused_optimizer = (fused.wanted(name, world.device) for name in ("loss", "optimizer"))
    passes = fuse_layers(model, fused, world.device)
    passes += [name for name, on in (("loss", fused_loss), ("optimizer", fused_optimizer)) if on]
    trained = TrainedModel(model, memory, attention or AttentionConfig(), fused_loss)
    for module in leaf_modules(model):
        set_z3_leaf_module(module, True)
        if memory.zero == 3:
            require_input_gradients(module)
    for buffer in model.buffers():  # DeepSpeed moves no buffer of a model whose weights are divided already
        buffer.data = buffer.data.to(world.device)
    bf16, zero0, states = model.dtype == torch.bfloat16, memory.zero == 0, memory.optimizer_states
    if states != "fp32" and not bf16:
        raise ConfigError(f"memory.optimizer_states={states} needs bf16 weights (model.dtype=bf16), and these are fp32")
    in_place = states != "fp32" and memory.zero < 3 and world.size == 1
    settings = _deepspeed_settings(optim, memory, world, bf16)
    if in_place:
        settings |= one_rank.SETTINGS
        settings["zero_optimization"] |= one_rank.ZERO_SETTINGS
    optimizer = build_optimizer(trained, optim, zero0 and not bf16, fused_optimizer, states)
    engine, *_ = deepspeed.initialize(model=trained, optimizer=optimizer, config=settings)
    if bf16 and zero0:
        start_moments(engine)
    if in_place:
        one_rank.update_in_place(engine)
    if states == "host":
        host_adamw, masters = engine.basic_optimizer, flat_weights(engine)
        host_adamw.norm = lambda: engine.optimizer._global_grad_norm
        trained.host_states = lambda log: host_adamw.reserve(masters, log)
    engine.learning_rate = optim.learning_rate
    engine.fused = passes
    return engine


def _deepspeed_settings(optim: OptimConfig, memory: MemoryConfig, world: World, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. bf16: whether the weights are bf16; otherwise they are fp32."""
    zero0, no_fp32 = memory.zero == 0, memory.optimizer_states != "fp32"  # no_fp32: DeepSpeed keeps nothing in fp32
    clips_itself = (zero0 and not bf16) or memory.optimizer_states == "host"  # the optimizer, instead of DeepSpeed
    return {
        "train_micro_batch_size_per_gpu": optim.micro_batch,
        "gradient_accumulation_steps": optim.accumulation(world.replicas),
        "gradient_clipping": 0.0 if clips_itself else optim.clip,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "bf16" if no_fp32 or (bf16 and zero0) else "fp32"},
        "bf16": {
            "enabled": bf16, "bf16_master_weights_and_grads": no_fp32, "bf16_optimizer_states": no_fp32,
            "immediate_grad_update": True,  # each bf16 gradient is freed once it is added to the fp32 one
        },
        "zero_optimization": {
            "stage": memory.zero, "reduce_bucket_size": REDUCE_BUCKET,
            "leaf_module": {"classes": []},  # ours alone; by default, some modules around experts too
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }  # fmt: skip


def flat_weights(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """The flat weights that this rank's optimizer updates, at ZeRO 1 to 3."""
    if engine.zero_optimization_partition_weights():
        return engine.optimizer.fp32_partitioned_groups_flat  # in no parameter group between steps
    return [weights for group in engine.basic_optimizer.param_groups for weights in group["params"]]
