"""The load-balancing loss of experts, over the tokens of whole sequences instead of those of a shard.

Of the tokens of all layers, let f_e be the share that is routed to expert e, counted once per expert of a token, and
P_e the mean of the router's probability of e. The loss is (Switch Transformer, arXiv:2101.03961, equations 4 to 6)

    L = experts * sum_e f_e P_e

f comes from a top-k, which has no gradient, and P is a mean over tokens. So with f summed over ranks, a rank's share

    experts / tokens * sum_e f_e * (sum of e's probabilities over the rank's own tokens)

adds up to L over the ranks, and its gradient is exact. The counts of a forward are one message of `experts` numbers.

transformers computes L in a model's own forward, by the function `load_balancing_loss_func` of its modeling file. When
a layer of the file first runs on the ring, that function is replaced: with a RingMask it returns the rank's share, and
otherwise it calls the original.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringflash.models.ring_mask import RingMask
from ringflash.ring.plan import AttentionPlan
from ringflash.ring.transport import ProcessRing
from ringflash.ring.ulysses import Ulysses

_NAME, _PARAMETERS = "load_balancing_loss_func", ["gate_logits", "num_experts", "top_k", "attention_mask"]


def router_loss(router_logits: Sequence[Tensor], active: int, plan: AttentionPlan) -> Tensor:
    """This rank's share of L, a scalar in fp32, or in the logits' dtype if that is wider. All ranks call this.

    router_logits: one tensor [local tokens, experts] per layer with experts, from the model's call with `plan`. active:
    the number of experts that a token is routed to. Tokens past the sequence's end do not count. Raises ValueError if
    there are no logits.
    """
    if not router_logits:
        raise ValueError("the model gives no router logits: transformers records none of this family")
    experts = router_logits[0].shape[-1]
    rows = len(router_logits[0]) // plan.positions.shape[-1]
    held = _held(plan, rows)
    dtype = torch.promote_types(router_logits[0].dtype, torch.float32)
    counts, probabilities = (torch.zeros(experts, dtype=x, device=held.device) for x in (torch.int64, dtype))
    for logits in router_logits:
        p = logits.to(dtype).softmax(-1)
        chosen = p.topk(active, dim=-1).indices
        counts.scatter_add_(0, chosen.flatten(), held.long().repeat_interleave(active))
        probabilities = probabilities + (p * held[:, None]).sum(0)
    sum_over_ranks(counts, plan)
    tokens = len(router_logits) * (rows // len(plan.local_ranks)) * plan.layout.length
    return experts / tokens * (counts.to(dtype) / tokens * probabilities).sum()


def share_router_loss(layer: nn.Module) -> None:
    """Make the modeling file of a layer use `router_loss` for models on the ring.

    Raises ValueError if its function is not the known one.
    """
    modeling = sys.modules[type(layer).__module__]
    original = getattr(modeling, _NAME, None)
    if original is None or getattr(original, "of_the_ring", False):
        return
    if list(inspect.signature(original).parameters) != _PARAMETERS:
        raise ValueError(
            f"output_router_logits=True is not supported on the ring for {modeling.__name__}: its {_NAME} takes other "
            f"arguments than {', '.join(_PARAMETERS)}"
        )
    setattr(modeling, _NAME, _shared(original))


def _shared(original: Callable) -> Callable:
    def load_balancing_loss_func(
        gate_logits: tuple[Tensor, ...] | None,
        num_experts: int | None = None,
        top_k: int = 2,
        attention_mask: Any = None,
    ) -> Tensor | int:
        if not gate_logits:
            return original(gate_logits, num_experts, top_k)
        mask = next(iter(attention_mask.values())) if isinstance(attention_mask, dict) else attention_mask
        if isinstance(mask, RingMask) and mask.plan is not None:
            return router_loss(gate_logits, top_k, mask.plan)
        model = sys._getframe(1).f_locals.get("self")
        if getattr(getattr(model, "config", None), "_attn_implementation", None) == "ring":
            raise ValueError(
                "output_router_logits=True needs the attention_mask of ring_inputs: without it the experts' loss would "
                "be that of a shard"
            )
        return original(gate_logits, num_experts, top_k, attention_mask)

    load_balancing_loss_func.of_the_ring = True  # type: ignore[attr-defined]
    return load_balancing_loss_func


def _held(plan: AttentionPlan, rows: int) -> Tensor:
    """Which tokens of the model's inputs, [rows, tokens held here], are of a sequence, bool and flat."""
    of_sequence = plan.positions[0]
    return (of_sequence < plan.layout.length).repeat_interleave(rows // len(of_sequence), dim=0).flatten()


def sum_over_ranks(x: Tensor, plan: AttentionPlan) -> None:
    """Sum x over the ranks that share the sequences of a plan, in place."""
    for group in (plan.ring, plan.ulysses):
        if isinstance(group, ProcessRing | Ulysses):
            dist.all_reduce(x, group=group.group)
