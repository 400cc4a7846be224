"""The optimizer of a run, AdamW or SGD under DeepSpeed: its parameter groups, clipping, and skipped steps.

At ZeRO 1 to 3, DeepSpeed computes the gradient norm, clips by it, and skips a step whose norm is not finite. At ZeRO 0
it does only a part of that, depending on the dtype; `build_optimizer` and `start_moments` add the rest.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from ringflash.models.quantized import shape_of
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.optimizers.host_adamw import HostAdamW
from ringflash.training.optimizers.split_adamw import SplitAdamW


class Clipped(torch.optim.Optimizer):
    """An optimizer that clips by the norm of all gradients, and skips steps whose norm is not finite.

    It is for fp32 weights at ZeRO 0, where all ranks have the averaged gradients and DeepSpeed does neither. After a
    step, DeepSpeed's engine reads `overflow` and `_global_grad_norm`, as it does from its own optimizers.
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


class ClippedAdamW(Clipped, torch.optim.AdamW):
    """AdamW that clips."""


class ClippedSGD(Clipped, torch.optim.SGD):
    """SGD that clips."""


def build_optimizer(
    model: nn.Module, optim: OptimConfig, clips: bool, fused: bool = False, states: str = "fp32"
) -> torch.optim.Optimizer:
    """The optimizer for DeepSpeed.

    clips: whether it clips gradients itself, as fp32 weights at ZeRO 0 need, where DeepSpeed does not clip. fused:
    whether one kernel updates all weights of a group. states: memory.optimizer_states.

    The learning rate is 0 until `train_step` sets that of the step, since DeepSpeed takes a step while it starts.
    Raises ConfigError for states that SGD does not have.
    """
    optim.check_states(states)
    settings: dict[str, Any] = {"lr": 0.0}
    groups = parameter_groups(model, optim.weight_decay)
    if optim.optimizer == "sgd":
        settings |= {"momentum": optim.beta1, "fused": fused or None}
        return ClippedSGD(groups, optim.clip, **settings) if clips else torch.optim.SGD(groups, **settings)
    settings |= {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if states == "bf16":
        return SplitAdamW(groups, fused, **settings)
    if states == "host":
        return HostAdamW(groups, fused, optim.clip, **settings)
    settings["fused"] = fused or None
    return ClippedAdamW(groups, optim.clip, **settings) if clips else torch.optim.AdamW(groups, **settings)


def start_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make AdamW's bias correction begin at the first step.

    With bf16 weights at ZeRO 0, DeepSpeed takes a step with zero gradients while it starts, which AdamW would count.
    """
    engine.basic_optimizer.state.clear()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups without empty ones: matrices, which decay, and norms and biases, which do not.

    Biases of experts are two-dimensional, [experts, features], so the name counts as well as the shape.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = {name: len(shape_of(p)) > 1 and not name.endswith("bias") for name, p in named}
    decayed = [p for name, p in named if decays[name]]
    others = [p for name, p in named if not decays[name]]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
