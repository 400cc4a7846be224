"""Gated DeltaNet on the ring: layers of linear attention that carry a state over the tokens of a document.

Such a layer projects each token, convolves its queries, keys and values with those of the 3 tokens before it, and
updates a state S per head by the gated delta rule (arXiv:2412.06464):

    S_t = exp(g_t) S_{t-1} (1 - beta_t k_t k_t^T) + beta_t v_t k_t^T        out_t = S_t q_t

Passed round a ring, the state would make each rank wait for the one before it. But channels and heads do not interact
between the projections. So the ranks of a sequence exchange tokens for heads, and each computes whole documents:

    this rank's tokens, all heads       in_proj: q, k, v, and what beta, g and the gate z are made of
                  | all-to-all (`ring.heads`)
    all tokens, this rank's heads       convolutions and delta rule, each document by itself
                  | all-to-all
    this rank's tokens, all heads       norm, gated by z; out_proj

The result is exact. A rank uses the convolution weights, A_log and dt_bias of its own heads. Their gradients are summed
over ranks like those of all other weights. A recomputed layer runs all of this again, including both exchanges.

On GPUs, flash-linear-attention computes convolutions and delta rule. On the CPU, transformers' own functions compute
them, document by document. `put_on_ring` gives transformers' class of the layer a forward that does this for calls with
a plan.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedConfig

from ringflash.models.checks import check_keywords
from ringflash.models.layers import delta_heads, delta_refusal
from ringflash.models.sources import digest, globals_of
from ringflash.ring.heads import head_blocks, sequence_ranks, to_heads, to_tokens
from ringflash.ring.plan import AttentionPlan
from ringflash.ring.sequences import Sequences
from ringflash.ring.watchdog import Label

PACKAGE, CORE = "flash-linear-attention", "fla-core"  # the second has the kernels, and comes with the first
OLDEST = "0.6"  # of these, whose functions take chunk_indices
OLDEST_TRITON = "3.7.1"  # on Hopper: older ones compile a kernel of the backward wrongly, so that fla raises there


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


_FORMS = {  # by the digest of a layer's forward (`models.sources`)
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


def device_refusal(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype | None = None, deterministic: bool = False
) -> str | None:
    """None, or why the gated DeltaNet layers of a configuration cannot run on a device.

    dtype: that of the weights; None if it is not known yet. deterministic: gradients must be bit-equal from run to run.
    """
    if delta_heads(config) is None or device.type == "cpu":
        return None
    try:
        found = metadata.version(CORE)
    except metadata.PackageNotFoundError:
        found = None
    if found is None or Version(found) < Version(OLDEST):
        return (
            f"model_type={config.model_type} needs {PACKAGE} {OLDEST} or newer for linear attention on device "
            f"{device}; this environment has {f'{CORE} {found}' if found else 'none'}: pip install --upgrade {PACKAGE}"
        )
    if (older := _triton_too_old(device)) is not None:
        return (
            f"model_type={config.model_type} needs triton {OLDEST_TRITON} or newer for linear attention on device "
            f"{device}, a Hopper GPU; this environment has triton {older}, with which {PACKAGE} refuses the backward: "
            f"gradients would be wrong. Upgrade torch (2.13 comes with triton 3.7.1), or pip install tilelang"
        )
    reason = _gradients_refusal(dtype, deterministic)
    return reason and f"model_type={config.model_type} {reason}"


def _triton_too_old(device: torch.device) -> str | None:
    """The version of Triton, where flash-linear-attention refuses the backward with it; else None.

    With tilelang, flash-linear-attention has another kernel.
    """
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    import triton

    found: str = triton.__version__
    return found if Version(found) < Version(OLDEST_TRITON) and find_spec("tilelang") is None else None


def _gradients_refusal(dtype: torch.dtype | None, deterministic: bool) -> str | None:
    """None, or why gradients by flash-linear-attention are not those that were asked for."""
    if dtype == torch.float32:
        return (
            f"is not supported in fp32 on GPUs, where {PACKAGE} gives wrong gradients of A_log and dt_bias; "
            f"use bf16 (model.dtype=bf16)"
        )
    if deterministic:
        return (
            f"is not supported with deterministic=True (attention.deterministic=true) on GPUs: {PACKAGE} times its "
            f"kernels in each process and takes the fastest, so gradients may differ from run to run"
        )
    return None


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
    kind = hidden_states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype
    if _has_kernels(hidden_states) and (reason := _gradients_refusal(dtype, keywords.get("deterministic", False))):
        raise ValueError(f"linear attention {reason}")


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
        _convolved(module, x, share.of(weight), sequences).unflatten(-1, (-1, size))
        for x, weight, size in zip(qkv, weights, sizes, strict=True)
    )
    g = -share.of(module.A_log).float().exp() * softplus(a.float() + share.of(module.dt_bias))
    beta = 2 * b.sigmoid() if getattr(module, "allow_neg_eigval", False) else b.sigmoid()
    return _recurrence(module, (q, k, v, g, beta), sequences).flatten(2)


def _convolved(module: Any, x: Tensor, weight: Tensor, sequences: Sequences) -> Tensor:
    """SiLU of x [1, T, channels] convolved within each document. weight: [channels, tokens]."""
    if _has_kernels(x):
        from fla.modules.causal_conv1d import causal_conv1d

        return causal_conv1d(x, weight, activation="silu", **_packed(sequences))[0]
    convolve = _plain(module, "causal_conv1d_fn")
    documents = x.split(sequences.lengths, dim=1)
    return torch.cat([convolve(document.mT, weight, activation="silu").mT for document in documents], dim=1)


def _recurrence(module: Any, tensors: tuple[Tensor, ...], sequences: Sequences) -> Tensor:
    """The delta rule of q, k [1, T, key heads, D], v [1, T, value heads, Dv] and g, beta [1, T, value heads]."""
    q, k, v, g, beta = tensors
    if _has_kernels(q):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, **_packed(sequences))[0]
    rule = _plain(module, "torch_chunk_gated_delta_rule")
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    documents = zip(*(x.split(sequences.lengths, dim=1) for x in (q, k, v, g, beta)), strict=True)
    return torch.cat([rule(*document, use_qk_l2norm_in_kernel=True)[0] for document in documents], dim=1)


def _has_kernels(x: Tensor) -> bool:
    """Whether flash-linear-attention computes, rather than transformers' functions in plain torch."""
    return x.device.type != "cpu"


def _packed(sequences: Sequences) -> dict[str, Tensor]:
    return {"cu_seqlens": sequences.cu_seqlens, "chunk_indices": sequences.chunk_indices}


def _plain(module: Any, name: str) -> Callable[..., Any]:
    """A function of a layer's modeling file in plain torch, also where transformers has a kernel in its place."""
    return inspect.unwrap(globals_of(type(module).forward)[name])
