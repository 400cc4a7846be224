"""Mamba-2 layers (arXiv:2405.21060): a state per head, which decays by a factor of its own at every token.

Such a layer projects each token, convolves x, B and C with those of the 3 tokens before it, and updates a state S per
head:

    S_t = exp(A dt_t) S_{t-1} + dt_t B_t x_t^T        out_t = S_t^T C_t + D x_t

with dt_t = softplus(dt + its bias), within limits. A, D and the bias are numbers of each head. Heads share B and C in
groups, so groups are key heads: B is a key, C a query, dt x a value and A dt the logarithm of a decay. A gated norm
follows, over all heads or over those of a group, and a projection. `models.linear_attention` runs these layers on the
ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from ringflash.models.linear_kernels import convolved, scan
from ringflash.models.mixer import Mixer, Projected, Share
from ringflash.ring.sequences import Sequences


def _project(module: Any, hidden_states: Tensor) -> Projected:
    return _split(module, module.in_proj(hidden_states))


def _project_scaled(module: Any, hidden_states: Tensor) -> Projected:
    """The projection of falcon_h1, with its multipliers."""
    scaled = module.in_proj(hidden_states * module.ssm_in_multiplier) * module.mup_vector
    return _split(module, scaled.to(hidden_states.dtype))


def _split(module: Any, projected: Tensor) -> Projected:
    gate, x, b, c, dt = projected.split([module.intermediate_size, *_convolved(module), module.num_heads], dim=-1)
    return Projected((b, c), (x, dt), gate)


def _convolved(module: Any) -> list[int]:
    """The numbers of channels of x, B and C."""
    of_groups = module.n_groups * module.ssm_state_size
    return [module.intermediate_size, of_groups, of_groups]


def _recur(module: Any, inputs: Sequence[Tensor], share: Share, sequences: Sequences) -> Tensor:
    b, c, x, dt = inputs
    conv, parts = module.conv1d, (share.of_values, share.of_keys, share.of_keys)
    weights = conv.weight.squeeze(1).split(_convolved(module))
    biases = [None] * 3 if conv.bias is None else conv.bias.split(_convolved(module))
    sizes = (module.head_dim, module.ssm_state_size, module.ssm_state_size)
    x, b, c = (
        convolved(module, y, of(weight), None if bias is None else of(bias), sequences).unflatten(-1, (-1, size))
        for y, of, weight, bias, size in zip((x, b, c), parts, weights, biases, sizes, strict=True)
    )
    step = softplus(dt.float() + share.of_values(module.dt_bias)).clamp(*module.time_step_limit)
    decay = -share.of_values(module.A_log).float().exp() * step
    out = scan(c, b, (x * step[..., None]).to(x.dtype), decay, sequences)
    return torch.addcmul(out, x, share.of_values(module.D).to(x.dtype)[:, None]).flatten(2)


def _finish(module: Any, out: Tensor, gate: Tensor) -> Tensor:
    normed = module.norm(out, gate) if getattr(module, "mamba_rms_norm", True) else out * silu(gate)
    return module.out_proj(normed.view(out.shape))


_HEADS = ("n_groups", "num_heads")
MIXERS = {  # by the digest of a layer's forward (`models.digests`)
    "babce40f389d": Mixer(_HEADS, _project, _recur, _finish),  # nemotron_h
    "a5d3c1e26441": Mixer(_HEADS, _project_scaled, _recur, _finish),  # falcon_h1
}
