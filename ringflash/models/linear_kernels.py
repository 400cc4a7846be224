"""Convolutions and recurrences of linear attention, and where they cannot be computed.

On GPUs, flash-linear-attention computes them, for all documents at once. On the CPU, plain torch computes them,
document by document: transformers' own functions, and the scan of this file. `models.delta_net` and `models.mamba2`
have the mathematics.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedConfig

from ringflash.models.digests import globals_of
from ringflash.models.layers import state_heads
from ringflash.ring.sequences import CHUNK, Sequences

PACKAGE, CORE = "flash-linear-attention", "fla-core"  # the second has the kernels, and comes with the first
OLDEST = "0.6"  # of these, whose functions take chunk_indices
OLDEST_TRITON = "3.7.1"  # on Hopper: older ones compile a kernel of the backward wrongly, so that fla raises there


def convolved(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sequences: Sequences) -> Tensor:
    """SiLU of x [1, T, channels] convolved within each document. weight: [channels, tokens]; bias: [channels]."""
    if _has_kernels(x):
        from fla.modules.causal_conv1d import causal_conv1d

        return causal_conv1d(x, weight, bias, activation="silu", **_packed(sequences))[0]
    convolve = _plain(module, "causal_conv1d_fn")
    documents = x.split(sequences.lengths, dim=1)
    return torch.cat([convolve(document.mT, weight, bias, activation="silu").mT for document in documents], dim=1)


def delta_rule(module: Any, tensors: tuple[Tensor, ...], sequences: Sequences) -> Tensor:
    """The delta rule of q, k [1, T, key heads, D], v [1, T, value heads, Dv] and g, beta [1, T, value heads]."""
    q, k, v, g, beta = tensors
    if _has_kernels(q):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, **_packed(sequences))[0]
    rule = _plain(module, "torch_chunk_gated_delta_rule")
    q, k = (_of_values(x, v) for x in (q, k))
    documents = zip(*(x.split(sequences.lengths, dim=1) for x in (q, k, v, g, beta)), strict=True)
    return torch.cat([rule(*document, use_qk_l2norm_in_kernel=True)[0] for document in documents], dim=1)


def scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, sequences: Sequences) -> Tensor:
    """S_t^T q_t of S_t = exp(g_t) S_{t-1} + k_t v_t^T, in v's shape and dtype.

    q, k [1, T, key heads, D], v [1, T, value heads, Dv], g [1, T, value heads] in fp32.
    """
    q, k = (_of_values(x, v) for x in (q, k))
    if _has_kernels(q):
        from fla.ops.simple_gla import chunk_simple_gla

        return chunk_simple_gla(q, k, v, g, scale=1.0, cu_seqlens=sequences.cu_seqlens)[0]
    documents = zip(*(x.float().split(sequences.lengths, dim=1) for x in (q, k, v, g)), strict=True)
    return torch.cat([_scan(*document) for document in documents], dim=1).to(v.dtype)


def _scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The scan of one document, chunk by chunk, in fp32.

    Let S be the state before a chunk, and G_st the sum of g over the tokens after s, up to t, so that G_0t is that from
    the chunk's beginning. The result of token t is

        exp(G_0t) S^T q_t + sum over s <= t of exp(G_st) (q_t . k_s) v_s

    Each G_st is summed by itself: as differences of one cumulative sum, they would give g an inexact gradient.
    """
    state = v.new_zeros(1, v.shape[2], k.shape[-1], v.shape[-1])
    results = []
    for q_, k_, v_, g_ in zip(*(x.split(CHUNK, dim=1) for x in (q, k, v, g)), strict=True):
        t = torch.arange(g_.shape[1], device=g.device)
        s_before_t, s_after_t = ((x > 0)[None, :, :, None] for x in (t[:, None] - t, t - t[:, None]))
        sums = g_[:, :, None].masked_fill(~s_before_t, 0.0).cumsum(1)
        decays, left = sums.masked_fill(s_after_t, -torch.inf).exp(), sums[:, -1].exp()
        carried = g_.cumsum(1).exp()
        weights = torch.einsum("bthd,bshd->btsh", q_, k_) * decays
        results.append(
            torch.einsum("bthd,bhde,bth->bthe", q_, state, carried) + torch.einsum("btsh,bshe->bthe", weights, v_)
        )
        state = state * carried[:, -1, :, None, None] + torch.einsum("bshd,bsh,bshe->bhde", k_, left, v_)
    return torch.cat(results, dim=1)


def _of_values(x: Tensor, v: Tensor) -> Tensor:
    """x [1, T, key heads, D] for each of v's heads."""
    return x.repeat_interleave(v.shape[2] // x.shape[2], dim=2)


def _has_kernels(x: Tensor) -> bool:
    """Whether flash-linear-attention computes, rather than plain torch."""
    return x.device.type != "cpu"


def _packed(sequences: Sequences) -> dict[str, Tensor]:
    return {"cu_seqlens": sequences.cu_seqlens, "chunk_indices": sequences.chunk_indices}


def _plain(module: Any, name: str) -> Callable[..., Any]:
    """A function of a layer's modeling file in plain torch, also where transformers has a kernel in its place."""
    return inspect.unwrap(globals_of(type(module).forward)[name])


# -- what is refused


def device_refusal(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype | None = None, deterministic: bool = False
) -> str | None:
    """None, or why the linear attention of a configuration cannot run on a device.

    dtype: that of the weights; None if it is not known yet. deterministic: gradients must be bit-equal from run to run.
    """
    if state_heads(config) is None or device.type == "cpu":
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


def call_refusal(hidden_states: Tensor, deterministic: bool) -> str | None:
    """None, or why a layer's call with these inputs, in their dtype or autocast's, would give other gradients."""
    kind = hidden_states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype
    reason = _gradients_refusal(dtype, deterministic) if _has_kernels(hidden_states) else None
    return reason and f"linear attention {reason}"


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
