"""Gated DeltaNet layers (arXiv:2412.06464): a state per value head, which is updated by the gated delta rule.

Such a layer projects each token, convolves its queries, keys and values with those of the 3 tokens before it, and
updates a state S per value head:

    S_t = exp(g_t) S_{t-1} (1 - beta_t k_t k_t^T) + beta_t v_t k_t^T        out_t = S_t q_t

where k has length 1, and q has length 1 / sqrt(its size). A norm, gated by z, and a projection follow. g and beta are
made of the features a and b. `models.linear_attention` runs these layers on the ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import softplus

from ringflash.models.linear_kernels import convolved, delta_rule
from ringflash.models.mixer import Mixer, Projected, Share
from ringflash.ring.sequences import Sequences


def _split(module: Any, x: Tensor) -> Projected:
    """The projections of qwen3_5: one for q, k and v."""
    q, k, v = module.in_proj_qkv(x).split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    return Projected((q, k), (v, module.in_proj_b(x), module.in_proj_a(x)), module.in_proj_z(x))


def _split_by_head(module: Any, x: Tensor) -> Projected:
    """The projections of qwen3_next: two, each ordered by key head."""
    q, k, v, z, b, a = module.fix_query_key_value_ordering(module.in_proj_qkvz(x), module.in_proj_ba(x))
    q, k, v, z = (heads.flatten(2) for heads in (q, k, v, z))
    return Projected((q, k), (v, b, a), z)


def _separate(module: Any, x: Tensor) -> Projected:
    """The projections of olmo_hybrid: one for each."""
    names = ("q_proj", "k_proj", "v_proj", "b_proj", "a_proj", "g_proj")
    q, k, v, b, a, z = (getattr(module, name)(x) for name in names)
    return Projected((q, k), (v, b, a), z)


def _recur(module: Any, inputs: Sequence[Tensor], share: Share, sequences: Sequences) -> Tensor:
    q, k, v, b, a = inputs
    of_q, of_k, of_v = module.conv1d.weight.squeeze(1).split([module.key_dim, module.key_dim, module.value_dim])
    weights = (share.of_keys(of_q), share.of_keys(of_k), share.of_values(of_v))
    sizes = (module.head_k_dim, module.head_k_dim, module.head_v_dim)
    q, k, v = (
        convolved(module, x, weight, None, sequences).unflatten(-1, (-1, size))
        for x, weight, size in zip((q, k, v), weights, sizes, strict=True)
    )
    g = -share.of_values(module.A_log).float().exp() * softplus(a.float() + share.of_values(module.dt_bias))
    beta = 2 * b.sigmoid() if getattr(module, "allow_neg_eigval", False) else b.sigmoid()
    return delta_rule(module, (q, k, v, g, beta), sequences).flatten(2)


def _finish(module: Any, out: Tensor, gate: Tensor, norm: str = "norm", projection: str = "out_proj") -> Tensor:
    normed = getattr(module, norm)(out.reshape(-1, module.head_v_dim), gate.reshape(-1, module.head_v_dim))
    return getattr(module, projection)(normed.view(out.shape))


def _mixer(project: Callable[[Any, Tensor], Projected], finish: Callable[[Any, Tensor, Tensor], Tensor]) -> Mixer:
    return Mixer(("num_k_heads", "num_v_heads"), project, _recur, finish)


MIXERS = {  # by the digest of a layer's forward (`models.digests`)
    "230b4c2bedce": _mixer(_split, _finish),
    "fb348a396c2e": _mixer(_split_by_head, _finish),
    "5d613e382e37": _mixer(_separate, partial(_finish, norm="o_norm", projection="o_proj")),
}
