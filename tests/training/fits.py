"""Fits on every grid of ranks, and the weights that they end with."""

import deepspeed
import torch.distributed as dist

from ringflash.training import loop

STEPS = 5

SETTINGS = [
    "data=text", "data.held_out=0", "data.sequence_length=32", "evaluation.every=0", "checkpoint.every=0",
    "logger.mode=disabled", "model.dtype=fp32", "seed=3", "data.seed=5", f"optim.steps={STEPS}", "optim.batch=4",
    "optim.warmup=2", "optim.final_lr=0.3", "optim.lr=1e-2", "optim.beta1=0.8", "optim.beta2=0.9", "optim.eps=1e-5",
    "optim.weight_decay=0.5", "optim.clip=0.05", "model.architecture.hidden_size=32", "model.architecture.head_dim=8",
    "model.architecture.intermediate_size=48",
]  # fmt: skip


def fit_on_ranks(config, resolved):
    """A whole run, in the pool's process group."""
    made, dist.init_process_group = dist.init_process_group, lambda *args, **options: None
    try:
        loop.fit(config, resolved)
    finally:
        dist.init_process_group = made


def weights_of(engine):
    """The weights as they are computed with, whole."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}
