"""Gated DeltaNet on the ring: layers of linear attention that carry a state over the tokens of a document.

Such a layer projects each token, convolves its queries, keys and values with those of the 3 tokens before it, and
updates a state S per head by the gated delta rule (arXiv:2412.06464):

    S_t = exp(g_t) S_{t-1} (1 - beta_t k_t k_t^T) + beta_t v_t k_t^T        out_t = S_t q_t

where k has length 1, and q has length 1 / sqrt(its size). Passed round a ring, the state would make each rank wait for
the one before it. But channels and heads do not interact between the projections. So the ranks of a sequence exchange
tokens for heads, and each computes whole documents:

    this rank's tokens, all heads       in_proj: q, k, v, and what beta, g and the gate z are made of
                  | all-to-all (`ring.heads`)
    all tokens, this rank's heads       convolutions and delta rule, each document by itself
                  | all-to-all
    this rank's tokens, all heads       norm, gated by z; out_proj

The result is exact. A rank uses the convolution weights, A_log and dt_bias of its own heads. Their gradients are summed
over ranks like those of all other weights. A recomputed layer runs all of this again, including both exchanges.

`models.delta_kernels` computes convolutions and delta rule. `put_on_ring` gives transformers' class of the layer a
forward that does all of this for calls with a plan.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedConfig

from ringflash.models.checks import check_keywords
from ringflash.models.delta_kernels import call_refusal, convolved, recurrence
from ringflash.models.digests import digest
from ringflash.models.layers import delta_heads, delta_refusal
from ringflash.ring.heads import head_blocks, sequence_ranks, to_heads, to_tokens
from ringflash.ring.plan import AttentionPlan
from ringflash.ring.sequences import Sequences
from ringflash.ring.watchdog import Label


class _Projected(NamedTuple):
    """Features [B, n, F] of this rank's tokens. b and a determine beta and g of each value head."""

    q: Tensor
    k: Tensor
    v: Tensor
    b: Tensor
    a: Tensor
    z: Tensor


def _split(module: Any, x: Tensor) -> _Projected:
    """The projections of qwen3_5: one for q, k and v."""
    q, k, v = module.in_proj_qkv(x).split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    return _Projected(q, k, v, module.in_proj_b(x), module.in_proj_a(x), module.in_proj_z(x))


def _split_by_head(module: Any, x: Tensor) -> _Projected:
    """The projections of qwen3_next: two, each ordered by key head."""
    q, k, v, z, b, a = module.fix_query_key_value_ordering(module.in_proj_qkvz(x), module.in_proj_ba(x))
    q, k, v, z = (heads.flatten(2) for heads in (q, k, v, z))
    return _Projected(q, k, v, b, a, z)


def _separate(module: Any, x: Tensor) -> _Projected:
    """The projections of olmo_hybrid: one for each."""
    names = ("q_proj", "k_proj", "v_proj", "b_proj", "a_proj", "g_proj")
    return _Projected(*(getattr(module, name)(x) for name in names))


class _Form(NamedTuple):
    """The projections of a class of layers, and the names of its norm and its output projection."""

    project: Callable[[Any, Tensor], _Projected]
    norm: str = "norm"
    out: str = "out_proj"


_FORMS = {  # by the digest of a layer's forward (`models.digests`)
    "230b4c2bedce": _Form(_split),
    "fb348a396c2e": _Form(_split_by_head),
    "5d613e382e37": _Form(_separate, "o_norm", "o_proj"),
}
_OF_ATTENTION = {"kernel", "deterministic", "compensated"}  # keywords that other layers read


def put_on_ring(config: PreTrainedConfig) -> bool:
    """Make the gated DeltaNet layers of a configuration's family exact in calls with a plan.

    Returns whether this changed a class. Raises ValueError if transformers' code is not the code that is known.
    """
    if delta_heads(config) is None:
        return False
    modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    kinds = [kind for name, kind in vars(modeling).items() if name.endswith("GatedDeltaNet")]
    others = [kind for kind in kinds if not getattr(kind.forward, "of_the_ring", False)]
    for kind in others:
        kind.forward = _on_ring(kind)
    return bool(others)


def _on_ring(kind: Any) -> Callable[..., Tensor]:
    """A forward for a class of layers: that of this file in calls with a plan, else the class's own."""
    original = kind.forward
    form = _FORMS.get(digest(original))
    if form is None:
        raise ValueError(
            f"{kind.__name__} of transformers {transformers.__version__} is not supported on the ring: its forward is "
            f"not the one that ringflash knows"
        )

    @functools.wraps(original)
    def forward(
        self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **keywords: Any
    ) -> Tensor:
        plan = keywords.pop("plan", None)
        if plan is None:
            return original(self, hidden_states, cache_params, attention_mask, **keywords)
        _check(self, plan, hidden_states, cache_params, attention_mask, keywords)
        return _forward(self, form, hidden_states, plan)

    forward.of_the_ring = True  # type: ignore[attr-defined]
    return forward


def _check(
    module: Any, plan: Any, hidden_states: Tensor, cache: Any, attention_mask: Any, keywords: dict[str, Any]
) -> None:
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
    if reason := delta_refusal(module.num_k_heads, sequence_ranks(plan)):
        raise ValueError(reason)
    if reason := call_refusal(hidden_states, keywords.get("deterministic", False)):
        raise ValueError(reason)


@torch.compiler.disable  # exchanges cannot be part of a compiled graph
def _forward(module: Any, form: _Form, hidden_states: Tensor, plan: AttentionPlan) -> Tensor:
    *inputs, z = form.project(module, hidden_states)
    rows, n, _ = z.shape
    label = Label(f"layer {module.layer_idx}", "forward")
    sequences = plan.sequences(rows // len(plan.ring.local))
    of_ranks = zip(*to_heads(inputs, plan, label), strict=True)
    own = [
        _delta_rule(module, [x[None] for x in of_rank], _Share(block, sequence_ranks(plan)), sequences)
        for block, of_rank in zip(head_blocks(plan), of_ranks, strict=True)
    ]
    out = to_tokens(torch.cat(own), plan, label)
    normed = getattr(module, form.norm)(out.reshape(-1, module.head_v_dim), z.reshape(-1, module.head_v_dim))
    return getattr(module, form.out)(normed.view(rows, n, -1))


class _Share(NamedTuple):
    """A block of the heads, of `blocks` equal ones."""

    block: int
    blocks: int

    def of(self, weight: Tensor) -> Tensor:
        """The block's rows of a weight."""
        return weight if self.blocks == 1 else weight.unflatten(0, (self.blocks, -1))[self.block]


def _delta_rule(module: Any, inputs: list[Tensor], share: _Share, sequences: Sequences) -> Tensor:
    """The result [1, T, F] of a share of the heads, from their q, k, v, b and a, each [1, T, F]."""
    *qkv, b, a = inputs
    weights = module.conv1d.weight.squeeze(1).split([module.key_dim, module.key_dim, module.value_dim])
    sizes = (module.head_k_dim, module.head_k_dim, module.head_v_dim)
    q, k, v = (
        convolved(module, x, share.of(weight), sequences).unflatten(-1, (-1, size))
        for x, weight, size in zip(qkv, weights, sizes, strict=True)
    )
    g = -share.of(module.A_log).float().exp() * softplus(a.float() + share.of(module.dt_bias))
    beta = 2 * b.sigmoid() if getattr(module, "allow_neg_eigval", False) else b.sigmoid()
    return recurrence(module, (q, k, v, g, beta), sequences).flatten(2)
