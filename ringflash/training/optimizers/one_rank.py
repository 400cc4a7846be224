"""ZeRO 1 and 2 on one rank with bf16 weights and gradients: the optimizer uses both in place.

ZeRO keeps flat copies of the weights and gradients that a rank updates. On a single rank, these would be copies of
everything: 4 bytes per parameter. Here the optimizer updates the weights themselves, from the backward's gradients:

    backward      a gradient per weight, 2 bytes per parameter
    step          chunk by chunk: gradients are joined, weights updated; a gradient is freed once it is read
"""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.runtime.utils import is_invalid_grad_norm
from torch import Tensor

# DeepSpeed's settings: sums over one rank need no fp32, no buffer and no contiguous gradients.
SETTINGS = {"communication_data_type": "bf16"}
ZERO_SETTINGS = {"contiguous_gradients": False, "reduce_bucket_size": 1}


def share_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let the optimizer update the bf16 weights themselves, instead of a flat copy of them."""
    zero = engine.optimizer
    masters = zero.single_partition_of_fp32_groups
    for master, partitions in zip(masters, zero.parallel_partitioned_bit16_groups, strict=True):
        master.data = partitions[0].detach()
    zero._link_all_hp_params()


def update_in_place(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let an engine's optimizer, `SplitAdamW` or `HostAdamW`, update the bf16 weights from their own gradients."""
    share_weights(engine)
    zero, of_deepspeed = engine.optimizer, engine.optimizer.step
    masters = zero.single_partition_of_fp32_groups

    def step(closure: None = None) -> None:
        zero.check_overflow(zero.partition_gradients)
        norm = None if zero.overflow else zero.scaled_global_norm()
        if norm is None or is_invalid_grad_norm(norm):
            of_deepspeed()  # which finds the same, skips the update and frees the gradients
            return
        zero._global_grad_norm = norm
        for group, master in enumerate(masters):
            gradients, zero.averaged_gradients[group] = zero.averaged_gradients[group], None
            zero.unscale_and_clip_grads(gradients, norm)
            engine.basic_optimizer.gradients[master] = gradients
            del gradients
            zero._optimizer_step(group)

    zero.step = step


def gradients_of(optimizer: torch.optim.Optimizer, weight: Tensor) -> list[Tensor] | None:
    """The gradients of a flat weight's parts, which the caller owns; None if it has none."""
    parts = optimizer.gradients.pop(weight, None)  # type: ignore[attr-defined]  # of both optimizers
    return [weight.grad] if parts is None and weight.grad is not None else parts


def in_chunks(parts: list[Tensor], size: int) -> Iterator[Tensor]:
    """The parts one after the other as flat tensors of `size` elements, the last one shorter; `parts` is emptied.

    >>> [chunk.tolist() for chunk in in_chunks([torch.arange(3), torch.arange(4)], 2)]
    [[0, 1], [2, 0], [1, 2], [3]]
    """
    pieces: list[Tensor] = []
    missing = size
    while parts:
        part = parts.pop(0).reshape(-1)
        while len(part):
            pieces.append(part[:missing])
            part, missing = part[missing:], missing - len(pieces[-1])
            if not missing:
                yield _joined(pieces)
                missing = size
    if pieces:
        yield _joined(pieces)


def _joined(pieces: list[Tensor]) -> Tensor:
    """The pieces as one tensor; `pieces` is emptied, so that only the caller holds it."""
    whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    pieces.clear()
    return whole
