"""Fused passes in a transformers model. They are set on its modules; transformers itself is not patched.

A layer's matrix products and its attention stay as they are, and the passes between them are replaced by those of
`ringflash.fused`. This file lists the code of transformers that computes exactly the same arithmetic, by digests of its
source (`models.digests`). All other classes stay as they are. Weights are used only in the forward of the module that
owns them, so ZeRO 3 gathers them as usual. MLPs, which become a single function (`models.mlp`), must be leaf modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ringflash.errors import ConfigError, check_choice
from ringflash.models.attention import ring_attention_forward
from ringflash.models.cache import RingCache
from ringflash.models.digests import digest, globals_of
from ringflash.models.mlp import GATED, replace_forward, spec_of

WHEN = ("auto", "always", "never")
# Digests of forwards, each with the first family that has it.
_NORMS = {  # RMSNorms, and what is added to the stored weight
    "877c750b3b66": 0.0,  # llama
    "dcd4b3562c5e": 0.0,  # olmo2: rounded once
    "67b3975b61e0": 0.0,  # helium: the weight in fp32, too
    "869a9a6eb2b9-2172588a0e76": 1.0,  # gemma, with its _norm
}
_DELTA_NORM = "6d4bb7376d2c"  # of gated DeltaNet layers (qwen3_next): times SiLU of a gate
_MAMBA_NORMS: dict[str, Callable[[Any], int]] = {  # of Mamba-2 layers: of x times SiLU of a gate, in groups of channels
    "434bb67d0003": lambda module: 1,  # bamba
    "cc95d062878b": lambda module: len(module.weight) // module.group_size,  # nemotron_h
    "f36161945572": lambda module: module.n_groups,  # falcon_h1
}
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}  # by their classes
_ROTARY = ("7f584885cc6a", "0175d472c9ad")  # llama's apply_rotary_pos_emb and rotate_half
_ATTENTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {  # and the keywords that attention gets of the module
    "9841229bea59": lambda module: {},  # llama
    "71a9c4e5cee0": lambda module: {"sliding_window": module.sliding_window},  # qwen2
    "6091b53d90a0": lambda module: {"sliding_window": module.sliding_window},  # qwen3, with norms of heads
    "f3672e172e4e": lambda module: {"sliding_window": getattr(module.config, "sliding_window", None)},  # mistral
    "e1356c728967": lambda module: {  # gemma2
        "sliding_window": module.sliding_window, "softcap": module.attn_logit_softcapping,
    },
}  # fmt: skip
_PRE_NORM_LAYERS = {"9ab883af657f", "849e8a6d3ac9"}  # llama, mixtral: norm, attention, addition, norm, MLP, addition


@dataclass(frozen=True)
class FusedConfig:
    """Passes to fuse into one kernel each: auto (if GPU and model allow it), always (or raise an error) or never."""

    norm: str = "auto"
    """RMSNorm, with the addition to the residual stream before it: auto, always or never."""

    rotary: str = "auto"
    """Rotary positions of queries and keys, with the norm of each head: auto, always or never."""

    mlp: str = "auto"
    """The activation of gated MLPs (SwiGLU, GeGLU): auto, always or never."""

    loss: str = "auto"
    """Cross entropy, whose gradient overwrites the logits of a tile: auto, always or never."""

    optimizer: str = "auto"
    """AdamW, in one kernel over all weights: auto, always or never."""

    def __post_init__(self) -> None:
        for f in fields(self):
            check_choice(f"fused.{f.name}", getattr(self, f.name), WHEN)

    def wanted(self, name: str, device: torch.device) -> bool:
        """Whether the pass `name` is to be fused on a device. Raises ConfigError if it must be and cannot be."""
        when = getattr(self, name)
        reason = _refusal(device)
        if when == "always" and reason is not None:
            raise ConfigError(f"fused.{name}=always {reason}; fused.{name}=auto leaves it as it is there")
        return when != "never" and reason is None


def fuse_layers(model: PreTrainedModel, config: FusedConfig, device: torch.device) -> list[str]:
    """Fuse the passes that `config` asks for in a model that will run on `device`. Returns the names of the fused ones.

    Raises ConfigError if a pass must be fused (always) and the model has no known class for it.
    """
    found = []
    for name, fuse in (("norm", _fuse_norms), ("rotary", _fuse_rotary), ("mlp", _fuse_mlps)):
        if not config.wanted(name, device):
            continue
        if fuse(model):
            found.append(name)
        elif getattr(config, name) == "always":
            raise ConfigError(
                f"fused.{name}=always: no layer of model_type={model.config.model_type} has that pass in a form that "
                f"can be fused; fused.{name}=auto leaves it as it is"
            )
    return found


def _refusal(device: torch.device) -> str | None:
    """None, or why no pass can be fused on a device."""
    try:
        from ringflash.fused.launch import refusal
    except ImportError as error:
        return f"needs Triton ({error})"
    return refusal(device)


def _set_forward(module: nn.Module, forward: Callable) -> None:
    module.forward = partial(forward, module)  # type: ignore[method-assign]


def _code(module: nn.Module) -> str:
    """The digest of a module's forward, and of the _norm that it calls, if it has one."""
    kind: Any = type(module)
    parts = [kind.forward, *([kind._norm] if hasattr(kind, "_norm") else [])]
    return "-".join(digest(part) for part in parts) if kind.__module__.startswith("transformers.models.") else ""


def _is_norm(module: nn.Module | None) -> bool:
    return module is not None and _code(module) in _NORMS


def _fuse_norms(model: nn.Module) -> bool:
    norms = [module for module in model.modules() if _is_norm(module)]
    for module in norms:
        _set_forward(module, _norm)
    for module in model.modules():
        if _code(module) == _DELTA_NORM and find_spec("fla") is not None:
            _set_forward(module, _delta_norm)
        if _code(module) in _MAMBA_NORMS and not getattr(module, "norm_before_gate", False):
            _set_forward(module, _mamba_norm)
    layer: Any
    for layer in model.modules():
        if (
            _code(layer) in _PRE_NORM_LAYERS
            and _is_norm(layer.input_layernorm)
            and _is_norm(layer.post_attention_layernorm)
        ):
            _set_forward(layer, _pre_norm_layer)
    return bool(norms)


def _fuse_rotary(model: nn.Module) -> bool:
    found = False
    for attention in model.modules():
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        if not _is_rotary_attention(attention) or any(norm is not None and not _is_norm(norm) for norm in norms):
            continue
        found = True
        _set_forward(attention, _attention)
        for norm in filter(None, norms):
            norm.plain_forward = norm.forward
            _set_forward(norm, _rotary_norm)
    return found


def _is_rotary_attention(module: nn.Module) -> bool:
    """Whether a module is a known attention class that rotates heads as Llama does."""
    if _code(module) not in _ATTENTIONS:
        return False
    turn = globals_of(type(module).forward).get("apply_rotary_pos_emb")
    half = None if turn is None else globals_of(turn).get("rotate_half")
    return turn is not None and half is not None and (digest(turn), digest(half)) == _ROTARY


def _fuse_mlps(model: nn.Module) -> bool:
    mlps = [
        module
        for module in model.modules()
        if _code(module) == GATED and spec_of(module) is not None and type(module.act_fn).__name__ in _ACTIVATIONS
    ]
    for mlp in mlps:
        replace_forward(mlp, _ACTIVATIONS[type(mlp.act_fn).__name__], tile=None)
    return bool(mlps)


def _epsilon(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _norm(
    module: Any, hidden_states: Tensor, residual: Tensor | None = None, both: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The norm of hidden_states + residual; both: also the sum, as (sum, norm)."""
    from ringflash.fused.norm import rms_norm

    offset = _NORMS[_code(module)]
    stream, normed = rms_norm(hidden_states, module.weight, _epsilon(module), residual=residual, offset=offset)
    return (stream, normed) if both else normed


def _delta_norm(module: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """The norm of hidden_states, times SiLU of the gate, by flash-linear-attention."""
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    return rms_norm_gated(hidden_states, gate, module.weight, None, eps=module.variance_epsilon)


def _mamba_norm(module: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """The norm of hidden_states times SiLU of the gate."""
    from ringflash.fused.gated_norm import gated_norm

    return gated_norm(hidden_states, gate, module.weight, _epsilon(module), _MAMBA_NORMS[_code(module)](module))


def _rotary_norm(module: Any, heads: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """The norm of each head [B, S, heads, D], rotated where cos and sin are given."""
    from ringflash.fused.rotary import rotary

    if cos is None or sin is None:
        return module.plain_forward(heads)
    return rotary(heads, cos, sin, module.weight, _epsilon(module), _NORMS[_code(module)])


def _attention(
    module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *args: Any, **keywords: Any
) -> tuple[Tensor, None]:
    """An attention layer on the ring, alone or with a RingCache; in other calls, the layer's own forward."""
    from ringflash.fused.rotary import rotary

    cache = keywords.get("past_key_values")
    if module.config._attn_implementation != "ring" or not isinstance(cache, RingCache | None) or args:
        return type(module).forward(module, hidden_states, position_embeddings, *args, **keywords)
    keywords.pop("past_key_values", None)
    shape = hidden_states.shape[:-1]
    projections = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (projection(hidden_states).view(*shape, -1, module.head_dim) for projection in projections)
    cos, sin = position_embeddings
    if (q_norm := getattr(module, "q_norm", None)) is not None:
        q, k = q_norm(q, cos, sin), module.k_norm(k, cos, sin)
    else:
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx)
    out, _ = ring_attention_forward(
        module, q, k, v, keywords.pop("attention_mask", None),
        dropout=module.attention_dropout if module.training else 0.0, scaling=module.scaling,
        **_ATTENTIONS[_code(module)](module), **keywords,
    )  # fmt: skip
    return module.o_proj(out.reshape(*shape, -1)), None


def _pre_norm_layer(layer: Any, hidden_states: Tensor, *args: Any, **keywords: Any) -> Tensor:
    """A layer whose additions to the residual stream are fused with the norms after them."""
    if args:  # transformers passes everything else by keyword
        raise TypeError(f"a fused layer takes hidden_states and keywords, got {len(args) + 1} positional arguments")
    stream, x = layer.input_layernorm(hidden_states, both=True)
    x, _ = layer.self_attn(hidden_states=x, **keywords)
    stream, x = layer.post_attention_layernorm(x, residual=stream, both=True)
    return stream + layer.mlp(x)
