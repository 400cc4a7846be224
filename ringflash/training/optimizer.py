"""Optimizer: AdamW and its schedule under DeepSpeed; which weights decay, clipping, and steps that are skipped.

At ZeRO 1 to 3 DeepSpeed computes the gradient norm, clips by it, and skips a step whose norm is not finite. At ZeRO 0
it does some of that, by dtype: `build_optimizer` and `start_moments` supply the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from ringflash.errors import ConfigError
from ringflash.training.host_adamw import HostAdamW
from ringflash.training.split_adamw import SplitAdamW


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    steps: int = 100
    """Optimizer steps of the run, including those before it was resumed."""

    batch: int = 1
    """Sequences per step, over all replicas and micro-batches."""

    micro_batch: int = 1
    """Sequences that a ring processes at once; gradients of the others of its step are accumulated."""

    lr: float = 3e-4
    """Peak learning rate, after a linear warm-up and before a cosine decay."""

    warmup: int = 10
    """Warm-up steps, the last of which has the peak learning rate; 0: the first step has it."""

    final_lr: float = 0.1
    """Learning rate of the last step, as a fraction of the peak."""

    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""

    beta2: float = 0.95
    """AdamW's decay rate of the second moment."""

    weight_decay: float = 0.1
    """AdamW's decoupled weight decay of matrices; norms and biases do not decay."""

    clip: float = 1.0
    """Gradient norm to which larger gradients are scaled down; 0: no clipping."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "warmup"):
            if type(getattr(self, name)) is not int:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be a whole number")
        for name in ("steps", "batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be 1 or more")
        if not 0 <= self.final_lr <= 1:
            raise ConfigError(f"optim.final_lr={self.final_lr} must be a fraction of the peak, 0 to 1")
        for name in ("lr", "warmup", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be 0 or more and finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be 0 or more and below 1")

        if self.warmup > self.steps:
            raise ConfigError(
                f"optim.warmup={self.warmup} is more than optim.steps={self.steps}: the learning rate would never "
                f"reach optim.lr={self.lr}"
            )

    def accumulation(self, replicas: int) -> int:
        """Micro-batches of a step. Raises ConfigError where the batch does not divide."""
        if self.batch % (replicas * self.micro_batch):
            raise ConfigError(
                f"optim.batch={self.batch} is not a multiple of {replicas} replicas "
                f"x optim.micro_batch={self.micro_batch}"
            )
        return self.batch // (replicas * self.micro_batch)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1. It depends on the step alone, so a resumed run continues it.

        >>> [round(OptimConfig(steps=6, warmup=2, lr=1.0, final_lr=0.5).learning_rate(step), 3) for step in range(1, 7)]
        [0.5, 1.0, 0.927, 0.75, 0.573, 0.5]
        """
        warmup = max(self.warmup, 1)
        if step <= warmup:
            return self.lr * step / warmup
        done = min((step - warmup) / max(self.steps - warmup, 1), 1.0)
        return self.lr * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2)


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips by the norm of all gradients, and skips a step whose norm is not finite.

    It is for fp32 weights at ZeRO 0, where all ranks have the averaged gradients and DeepSpeed does neither. Its engine
    reads `overflow` and `_global_grad_norm` after a step, as it does from its own optimizers.
    """

    def __init__(self, groups: list[dict], clip: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.clip = clip
        self.overflow = False
        self._global_grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None):
        """Update the weights, unless the gradients' norm is not finite."""
        weights = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        self._global_grad_norm, self.overflow = norm, not norm.isfinite()
        if self.overflow:
            return None
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(weights, self.clip, norm)
        return super().step(closure)


def build_optimizer(
    model: nn.Module, optim: OptimConfig, fp32_zero0: bool, fused: bool = False, states: str = "fp32"
) -> torch.optim.Optimizer:
    """The optimizer for DeepSpeed. fp32_zero0: fp32 weights at ZeRO 0, which DeepSpeed would not clip.

    fused: updates all weights of a group in one kernel. states: memory.optimizer_states.

    Its learning rate is 0 until `train_step` sets that of the step: DeepSpeed makes a step of its own while it starts.
    """
    settings: dict[str, Any] = {"lr": 0.0, "betas": (optim.beta1, optim.beta2)}
    groups = parameter_groups(model, optim.weight_decay)
    if states == "bf16":
        return SplitAdamW(groups, fused, **settings)
    if states == "host":
        return HostAdamW(groups, fused, optim.clip, **settings)
    settings["fused"] = fused or None
    return ClippedAdamW(groups, optim.clip, **settings) if fp32_zero0 else torch.optim.AdamW(groups, **settings)


def start_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let AdamW's bias correction begin at the first step.

    With bf16 weights at ZeRO 0, DeepSpeed makes a step of zero gradients while it starts, which AdamW would count.
    """
    engine.basic_optimizer.state.clear()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices, which decay, and norms and biases, which do not.

    Biases of experts are two-dimensional, [experts, features], so the name decides as well as the shape.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.dim() > 1 and not name.endswith("bias")]
    others = [p for name, p in named if p.dim() <= 1 or name.endswith("bias")]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
