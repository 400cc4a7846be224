"""RoPE that goes by a document's length: longrope and dynamic RoPE, beyond a model's original positions.

transformers takes the length from the longest position of a call. Of a packed row that is the longest document's, and
on a ring it is a shard's. Two ways give each document what it would get by itself, or by a length of one's choice:

- longrope has two sets of frequencies, for documents up to the original length and for longer ones. After
  `rope_by_document`, each token turns by the set of its own document.
- `pin_rope` gives all documents the frequencies of a document of one length.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ringflash.models.rope import BY_LENGTH, listed, rope_parameters
from ringflash.ring.plan import AttentionPlan


def length_refusal(
    config: PreTrainedConfig, length: int, model: nn.Module | None = None, by_document: bool = False
) -> str | None:
    """None, or which RoPE of sequences of `length` tokens would be another on each shard.

    model: may be pinned. by_document: whether each document of a plan may have its own, as it has in a model that
    `rope_by_document` was given.
    """
    if by_document and (can_go_by_document(config) if model is None else _has_plan(model)):
        return None
    for rope in rope_parameters(config):
        kind = rope.get("rope_type", "default")
        if kind in BY_LENGTH and length > _original(config, rope) and (model is None or _kinds(model) != {"pinned"}):
            return (
                f"rope_parameters.rope_type={kind} turns by a document's length where that is more than "
                f"{_original(config, rope)}, and a sequence has {length} tokens: pin it to the frequencies of "
                f"documents of N tokens, by model.rope_length=N or ringflash.models.pin_rope(model, N)"
                + (", or call ringflash.models.rope_by_document(model)" * (by_document and can_go_by_document(config)))
            )
    return None


def pin_rope(model: nn.Module, tokens: int) -> None:
    """Give all documents the rotary frequencies that transformers gives a document of `tokens` tokens.

    For longrope and dynamic RoPE, which go by the longest position of a call: on the ring, of a shard. A pinned model
    equals transformers' own for documents of that length; with longrope for all on the same side of the original
    length. Its configuration stays as it is. Raises ValueError for a model without such a RoPE.
    """
    for name, module in [*model.named_modules()]:
        if isinstance(module, ByDocument):
            model.set_submodule(name, module.own)
    if not (kinds := _kinds(model)) or not kinds <= {*BY_LENGTH, "pinned"}:
        raise ValueError(f"the model's RoPE is {listed(kinds) if kinds else 'none'}: {listed(BY_LENGTH)} go by length")
    for module in _rotary(model):
        _pin(module, tokens)


def rope_by_document(model: PreTrainedModel) -> None:
    """Have longrope turn each token by the frequencies that transformers gives its document alone.

    On the ring, where a plan says which tokens are a document; without one, transformers' own rule stays. Raises
    ValueError for a model with another RoPE.
    """
    if not can_go_by_document(model.config):
        kinds = listed(rope.get("rope_type", "default") for rope in rope_parameters(model.config) or [{}])
        raise ValueError(f"model_type={model.config.model_type} with {kinds} RoPE cannot go by document: longrope can")
    for name, module in [*model.named_modules()]:
        if getattr(module, "rope_type", None) == "longrope":
            model.set_submodule(name, ByDocument(module))
    model.base_model.register_forward_pre_hook(_take_plan, with_kwargs=True)
    model.base_model.register_forward_hook(_leave_plan, always_call=True)


def can_go_by_document(config: PreTrainedConfig) -> bool:
    """Whether `rope_by_document` takes models of this configuration; phimoe's scale depends on a call's length too."""
    one = getattr(config, "rope_parameters", None) or {}
    return one.get("rope_type") == "longrope" and config.model_type != "phimoe"


class ByDocument(nn.Module):
    """Stands for a rotary module with longrope, `own`, while a plan says which tokens are a document."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.original = _original(own.config, own.config.rope_parameters)
        self.own = own
        self.short, self.long = copy.deepcopy(own), copy.deepcopy(own)
        for module, tokens in ((self.short, self.original), (self.long, self.original + 1)):
            _pin(module, tokens)
        self.plan: AttentionPlan | None = None

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        """(cos, sin), each [rows, n, D], or what else the family's module makes of [rows, n] positions."""
        if self.plan is None or self.plan.layout.length <= self.original:
            return self.own(x, position_ids)
        is_long = self.plan.document_lengths(len(position_ids) // len(self.plan.ring.local))[..., None] > self.original
        short, long = self.short(x, position_ids), self.long(x, position_ids)
        if isinstance(short, Tensor):
            return torch.where(is_long, long, short)
        return tuple(torch.where(is_long, b, a) for a, b in zip(short, long, strict=True))


def _take_plan(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    _set_plan(model, kwargs.get("plan"))


def _leave_plan(model: nn.Module, args: Any, out: Any) -> None:
    _set_plan(model, None)


def _has_plan(model: nn.Module) -> bool:
    """Whether a model, in a call, turns tokens by the documents of its plan."""
    return any(isinstance(module, ByDocument) and module.plan is not None for module in model.modules())


def _set_plan(model: nn.Module, plan: AttentionPlan | None) -> None:
    for module in model.modules():
        if isinstance(module, ByDocument):
            module.plan = plan


def _pin(module: Any, tokens: int) -> None:
    if module.config.model_type == "phimoe":
        raise ValueError("phimoe scales its positions by their length too, which cannot be pinned")
    kind = module.config.rope_parameters["rope_type"]  # also of a module that is pinned again
    frequencies, module.attention_scaling = ROPE_INIT_FUNCTIONS[kind](
        module.config, module.inv_freq.device, seq_len=tokens
    )
    module.register_buffer("inv_freq", frequencies, persistent=False)
    module.rope_type = "pinned"


def _original(config: PreTrainedConfig, rope: dict[str, Any]) -> int:
    """The most tokens of a document whose RoPE does not go by length."""
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings


def _rotary(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "rope_type")]


def _kinds(model: nn.Module) -> set[str]:
    """The kinds of a model's rotary modules; "by layer" for one that has several."""
    return {x.rope_type if isinstance(x.rope_type, str) else "by layer" for x in _rotary(model)}
