"""Linear attention on the ring: layers that carry a state over the tokens of a document.

Passed round a ring, the state would make each rank wait for the one before it. But channels and heads do not interact
between a layer's projections. So the ranks of a sequence exchange tokens for heads, and each computes whole documents:

    this rank's tokens, all heads       projections, as of keys, values, decays and a gate
                  | all-to-all (`ring.heads`)
    all tokens, this rank's heads       convolutions and recurrence, each document by itself
                  | all-to-all
    this rank's tokens, all heads       norm and gate; output projection

The result is exact. A rank uses the rows of convolutions and other weights of its own heads. Their gradients are summed
over ranks like those of all other weights. A recomputed layer runs all of this again, including both exchanges.

`models.delta_net` and `models.mamba2` have the mathematics of each kind of layer. `put_on_ring` gives transformers'
class of the layer a forward that does all of this for calls with a plan.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from ringflash.models import delta_net, mamba2
from ringflash.models.checks import check_keywords
from ringflash.models.digests import digest
from ringflash.models.families import Recurrence, recurrence_of
from ringflash.models.layers import sharing_refusal, state_layers
from ringflash.models.linear_kernels import call_refusal
from ringflash.models.mixer import Mixer, Share, copied
from ringflash.ring.heads import head_blocks, sequence_ranks, to_heads, to_tokens
from ringflash.ring.plan import AttentionPlan
from ringflash.ring.watchdog import Label

_MIXERS = delta_net.MIXERS | mamba2.MIXERS
_OF_ATTENTION = {"kernel", "deterministic", "compensated"}  # keywords that other layers read


def put_on_ring(config: PreTrainedConfig) -> bool:
    """Make the layers of linear attention of a configuration's family exact in calls with a plan.

    Returns whether this changed a class. Raises ValueError if transformers' code is not the code that is known.
    """
    if (recurrence := recurrence_of(config.model_type)) is None or not state_layers(config):
        return False
    modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    kinds = [kind for name, kind in vars(modeling).items() if name.endswith(recurrence.classes)]
    others = [kind for kind in kinds if not getattr(kind.forward, "of_the_ring", False)]
    for kind in others:
        kind.forward = _on_ring(kind, recurrence)
    return bool(others)


def _on_ring(kind: Any, recurrence: Recurrence) -> Callable[..., Tensor]:
    """A forward for a class of layers: that of this file in calls with a plan, else the class's own."""
    original = kind.forward
    mixer = _MIXERS.get(digest(original))
    if mixer is None:
        raise ValueError(
            f"{kind.__name__} of transformers {transformers.__version__} is not supported on the ring: its forward is "
            f"not the one that ringflash was written for"
        )

    @functools.wraps(original)
    def forward(
        self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **keywords: Any
    ) -> Tensor:
        plan = keywords.pop("plan", None)
        if plan is None:
            return original(self, hidden_states, cache_params, attention_mask, **keywords)
        _check(plan, hidden_states, cache_params, attention_mask, keywords)
        key, value = (getattr(self, name) for name in mixer.heads)
        if reason := sharing_refusal(recurrence, key, value, sequence_ranks(plan)):
            raise ValueError(reason)
        return _forward(self, mixer, hidden_states, plan)

    forward.of_the_ring = True  # type: ignore[attr-defined]
    return forward


def _check(plan: Any, hidden_states: Tensor, cache: Any, attention_mask: Any, keywords: dict[str, Any]) -> None:
    """Raise ValueError for calls whose results would be wrong on shards."""
    if cache is not None:
        raise ValueError(f"past_key_values={type(cache).__name__} is not supported by layers of linear attention")
    if not isinstance(plan, AttentionPlan):
        raise ValueError(f"plan must be an AttentionPlan, as in what ring_inputs returns, got {plan!r:.100}")
    check_keywords(attention_mask, {name: x for name, x in keywords.items() if name not in _OF_ATTENTION})
    rows, n = hidden_states.shape[:2]
    if rows % (len(plan.ring.local) * plan.batch) or n != plan.token_layout.shard_length:
        raise ValueError(
            f"hidden_states {[*hidden_states.shape]} do not fit the plan, of {len(plan.ring.local)} local ranks, "
            f"{plan.batch} batch rows and {plan.token_layout.shard_length} tokens per shard"
        )
    if reason := call_refusal(hidden_states, keywords.get("deterministic", False)):
        raise ValueError(reason)


@torch.compiler.disable  # exchanges cannot be part of a compiled graph
def _forward(module: Any, mixer: Mixer, hidden_states: Tensor, plan: AttentionPlan) -> Tensor:
    projected = mixer.project(module, hidden_states)
    label = Label(f"layer {module.layer_idx}", "forward")
    sequences = plan.sequences(len(hidden_states) // len(plan.ring.local))
    ranks, key_heads = sequence_ranks(plan), getattr(module, mixer.heads[0])
    parts = [*(copied(x, 2, key_heads, ranks) for x in projected.of_keys), *projected.of_values]
    of_ranks = zip(*to_heads(parts, plan, label), strict=True)
    own = [
        mixer.recur(module, [x[None] for x in of_rank], Share(block, ranks, key_heads), sequences)
        for block, of_rank in zip(head_blocks(plan), of_ranks, strict=True)
    ]
    return mixer.finish(module, to_tokens(torch.cat(own), plan, label), projected.gate)
