"""AdamW for bf16 weights with an exact fp32 master, in 16 bits per state.

A plain bf16 weight loses small updates: between .008 and .016 its neighbours are 6e-5 apart, so an update of 2e-5 is
rounded away. The fp32 master weight is therefore kept, as two halves:

    master = bits of the bf16 weight << 16, plus low          low: int16, -32768 to 32767

The weight is the master rounded to nearest, and low is the rounding error. Both moments are bf16, rounded
stochastically so that they are right on average: with beta2 = .999, rounding to nearest would never change them. The
random bits depend only on the step and the element, so a resumed run continues bit for bit.

With a bf16 gradient, this takes 10 bytes per parameter on one rank (`one_rank`), where fp32 states take 18. Several
ranks take 12, for a flat copy of the weights, and divide everything except the weights and the backward's gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringflash.training.optimizers.one_rank import gradients_of, in_chunks

CHUNK = 2**24  # elements updated at once: only these have joined gradients and fp32 copies


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, low): an fp32 master as a bf16 weight, rounded to nearest, and the int16 rounding error.

    >>> weight, low = split(torch.tensor([1.0, 1.001, -3.14159]))
    >>> joined(weight, low)
    tensor([ 1.0000,  1.0010, -3.1416])
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def joined(weight: Tensor, low: Tensor) -> Tensor:
    """The fp32 master of a bf16 weight and its int16 low bits."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 rounded to bf16, up or down with probabilities that make it right on average."""
    noise = torch.randint(0, 2**16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)


class SplitAdamW(torch.optim.Optimizer):
    """AdamW on bf16 parameters; state: low (int16 bits, viewed as bf16), exp_avg and exp_avg_sq (bf16), step.

    low is viewed as bf16, because torch gives loaded states their parameter's dtype. fused: by one Triton kernel.
    """

    def __init__(self, groups: list[dict], fused: bool, **settings: Any) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0} | settings)
        self.fused = fused
        self.gradients: dict[Tensor, list[Tensor]] = {}  # of weights whose gradients are in parts (`one_rank`)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is evaluated
        """Update the weights that have a gradient. Raises TypeError for weights that are not bf16."""
        for group in self.param_groups:
            for number, weight in enumerate(group["params"]):
                gradients = gradients_of(self, weight)
                if gradients is None:
                    continue
                if weight.dtype != torch.bfloat16:
                    raise TypeError(f"SplitAdamW is for bf16 weights, got {weight.dtype}")
                state = self.state[weight]
                if not state:
                    state["step"] = 0
                    state |= {name: torch.zeros_like(weight) for name in ("low", "exp_avg", "exp_avg_sq")}
                state["step"] += 1
                self._update(weight, gradients, state, group, number)

    def _update(
        self, weight: Tensor, gradients: list[Tensor], state: dict[str, Any], group: dict[str, Any], number: int
    ) -> None:
        """One step of one parameter. gradients: of its parts; emptied."""
        beta1, beta2 = group["betas"]
        step = int(state["step"])
        settings = {
            "lr": float(group["lr"]), "beta1": beta1, "beta2": beta2, "eps": group["eps"],
            "decay": group["weight_decay"], "step": step, "seed": (step * 8191 + number * 64) % 2**31,
        }  # fmt: skip
        flat = [x.view(-1).split(CHUNK) for x in (weight, state["low"], state["exp_avg"], state["exp_avg_sq"])]
        if self.fused:
            from ringflash.fused.adamw import adamw_

            for i, chunk in enumerate(zip(*flat, in_chunks(gradients, CHUNK), strict=True)):
                adamw_(*chunk, **settings, begin=i * CHUNK)
            return
        generator = torch.Generator(weight.device).manual_seed(settings.pop("seed"))
        for w, low, mean, square, gradient in zip(*flat, in_chunks(gradients, CHUNK), strict=True):
            _plain_step(w, low, mean, square, gradient, generator, **settings)


def _plain_step(
    weight: Tensor, low: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, generator: torch.Generator,
    lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int,
) -> None:  # fmt: skip
    """The step in plain torch, in fp32."""
    g = gradient.float()
    m = beta1 * mean.float() + (1 - beta1) * g
    v = beta2 * square.float() + (1 - beta2) * g * g
    master = joined(weight, low.view(torch.int16))
    master -= lr * decay * master + lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    high, rest = split(master)
    weight.copy_(high)
    low.view(torch.int16).copy_(rest)
    mean.copy_(stochastic_round(m, generator))
    square.copy_(stochastic_round(v, generator))
