"""Fused passes in a transformers model: set on its modules, so that nothing of transformers itself is replaced.

A layer's own Python stays in charge of its matrix products and of attention; the passes between them are those of
`ringflash.fused`. Which classes compute exactly that arithmetic is listed here, by name. Other classes stay as they
are. Weights are only used in the forward of the module that owns them, so that ZeRO 3 gathers them as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ringflash.errors import ConfigError
from ringflash.models.attention import ring_attention_forward

WHEN = ("auto", "always", "never")
# RMSNorms, and what is added to the stored weight.
_NORMS = {
    "Gemma2RMSNorm": 1.0, "Gemma3RMSNorm": 1.0, "GptOssRMSNorm": 0.0, "LlamaRMSNorm": 0.0, "MistralRMSNorm": 0.0,
    "Olmo2RMSNorm": 0.0, "Olmo3RMSNorm": 0.0, "Phi3RMSNorm": 0.0, "Qwen2RMSNorm": 0.0, "Qwen3MoeRMSNorm": 0.0,
    "Qwen3RMSNorm": 0.0, "SmolLM3RMSNorm": 0.0,
}  # fmt: skip
# down(act(gate(x)) * up(x)), and the activations that are fused, by their classes.
_MLPS = {
    "Gemma2MLP", "Gemma3MLP", "LlamaMLP", "MistralMLP", "Olmo2MLP", "Olmo3MLP", "Qwen2MLP", "Qwen3MLP", "Qwen3MoeMLP",
    "SmolLM3MLP",
}  # fmt: skip
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}
# Projections, norms of heads if there are any, rotary positions, attention, projection.
_ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "Qwen3MoeAttention"}
# norm, attention, addition, norm, MLP, addition.
_PRE_NORM_LAYERS = {
    "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "SmolLM3DecoderLayer",
}  # fmt: skip


@dataclass(frozen=True)
class FusedConfig:
    """Which passes between matrix products run as one kernel. auto: where GPU and model allow; always: or refuse."""

    norm: str = "auto"
    """RMSNorms, with the addition to the residual stream before them: auto, always or never."""

    rotary: str = "auto"
    """Rotary positions of queries and keys, with the norms of their heads: auto, always or never."""

    mlp: str = "auto"
    """The activation of gated MLPs (SwiGLU, GeGLU): auto, always or never."""

    loss: str = "auto"
    """Cross entropy, its gradient in place of a tile's logits: auto, always or never."""

    optimizer: str = "auto"
    """AdamW in one kernel over all weights: auto (on a GPU), always or never."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) not in WHEN:
                raise ConfigError(f"fused.{f.name}={getattr(self, f.name)} is not one of {', '.join(WHEN)}")

    def wanted(self, name: str, device: torch.device) -> bool:
        """Whether the pass `name` is to be fused on a device. Raises ConfigError where it must be and cannot be."""
        when = getattr(self, name)
        reason = _refusal(device)
        if when == "always" and reason is not None:
            raise ConfigError(f"fused.{name}=always {reason}; fused.{name}=auto leaves it as it is there")
        return when != "never" and reason is None


def fuse_layers(model: PreTrainedModel, config: FusedConfig, device: torch.device) -> list[str]:
    """Fuse what `config` asks for in the layers of a model that will run on `device`; the names of what was fused.

    Raises ConfigError where a pass must be fused (always) and the model has no class that is known.
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


def _modules(model: nn.Module, names: Any) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in names]


def _set_forward(module: nn.Module, forward: Callable) -> None:
    module.forward = partial(forward, module)  # type: ignore[method-assign]


def _fuse_norms(model: nn.Module) -> bool:
    norms = _modules(model, _NORMS)
    for module in norms:
        _set_forward(module, _norm)
    for layer in _modules(model, _PRE_NORM_LAYERS):
        _set_forward(layer, _pre_norm_layer)
    return bool(norms)


def _fuse_rotary(model: nn.Module) -> bool:
    attentions = _modules(model, _ATTENTIONS)
    for attention in attentions:
        _set_forward(attention, _attention)
        for name in ("q_norm", "k_norm"):
            if (norm := getattr(attention, name, None)) is not None:
                norm.plain_forward = norm.forward
                _set_forward(norm, _rotary_norm)
    return bool(attentions)


def _fuse_mlps(model: nn.Module) -> bool:
    mlps = [mlp for mlp in _modules(model, _MLPS) if type(mlp.act_fn).__name__ in _ACTIVATIONS]
    for mlp in mlps:
        _set_forward(mlp, _mlp)
    return bool(mlps)


def _epsilon(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _norm(
    module: Any, hidden_states: Tensor, residual: Tensor | None = None, both: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The norm of hidden_states + residual; both: also the sum, as (sum, norm)."""
    from ringflash.fused.norm import rms_norm

    offset = _NORMS[type(module).__name__]
    stream, normed = rms_norm(hidden_states, module.weight, _epsilon(module), residual=residual, offset=offset)
    return (stream, normed) if both else normed


def _rotary_norm(module: Any, heads: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """The norm of each head [B, S, heads, D], rotated where cos and sin are given."""
    from ringflash.fused.rotary import rotary

    if cos is None or sin is None:
        return module.plain_forward(heads)
    return rotary(heads, cos, sin, module.weight, _epsilon(module), _NORMS[type(module).__name__])


def _mlp(module: Any, x: Tensor) -> Tensor:
    """down(act(gate(x)) * up(x))."""
    from ringflash.fused.gated import gated

    activation = _ACTIVATIONS[type(module.act_fn).__name__]
    return module.down_proj(gated(module.gate_proj(x), module.up_proj(x), activation))


def _attention(
    module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *args: Any, **keywords: Any
) -> tuple[Tensor, None]:
    """An attention layer on the ring; off it, or with a cache, the layer's own forward."""
    from ringflash.fused.rotary import rotary

    if module.config._attn_implementation != "ring" or keywords.pop("past_key_values", None) is not None or args:
        return type(module).forward(module, hidden_states, position_embeddings, *args, **keywords)
    shape = hidden_states.shape[:-1]
    projections = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (projection(hidden_states).view(*shape, -1, module.head_dim) for projection in projections)
    cos, sin = position_embeddings
    if (q_norm := getattr(module, "q_norm", None)) is not None:
        q, k = q_norm(q, cos, sin), module.k_norm(k, cos, sin)
    else:
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    window = module.config.sliding_window if type(module).__name__ == "MistralAttention" else None
    out, _ = ring_attention_forward(
        module, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), keywords.pop("attention_mask", None),
        dropout=module.attention_dropout if module.training else 0.0, scaling=module.scaling,
        sliding_window=getattr(module, "sliding_window", window), **keywords,
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
