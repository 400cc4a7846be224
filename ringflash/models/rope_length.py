"""RoPE that depends on a document's length: longrope and dynamic RoPE, beyond a model's original positions.

transformers takes the length from the largest position of a call. In a packed row this is the length of the longest
document, and on a ring that of a shard. With a cache it grows, while keys keep the frequencies of shorter lengths.
There are two ways to set the length instead:

- `rope_per_document`: each token is rotated by the frequencies that transformers gives its document alone. A plan has
  the lengths of its documents; a cache holds one document, whose length is `RingCache(rope_length=N)`.
- `fix_rope_length`: all documents get the frequencies of a document of one length.

Up to the original length, both RoPEs use the frequencies that a rotary module is made with. Beyond it, longrope has one
other set for all lengths, and dynamic RoPE has a set for each length.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ringflash.intervals import to_device
from ringflash.mask import check_tokens
from ringflash.models.rope import LENGTH_DEPENDENT, listed, rope_parameters, scales_by_position
from ringflash.ring.plan import AttentionPlan


def length_refusal(
    config: PreTrainedConfig, length: int, model: nn.Module | None = None, per_document: bool = False
) -> str | None:
    """None, or which RoPE would differ between the shards of sequences of `length` tokens.

    model: if given, its length may be fixed, or a call may have given it its documents. per_document: whether each call
    gives a model of this configuration its documents, as after `rope_per_document`.
    """
    can = has_length_dependent_rope(config)
    if (per_document and can) or any(module.length for module in _replaced(model)):
        return None
    remedy = (
        "use the frequencies of documents of N tokens, by model.rope_length=N or "
        "ringflash.models.fix_rope_length(model, N), or call ringflash.models.rope_per_document(model), and give a "
        "cache rope_length=N"
    )
    for kind, original in _original_lengths(config):
        if length > original:
            reason = f"{_beyond(kind, original)}, and a sequence has {length} tokens"
            return f"{reason}: {remedy if can else 'not supported in layers that differ in their RoPE'}"
    return None


def growth_refusal(config: PreTrainedConfig, begin: int, end: int) -> str | None:
    """None, or which RoPE changes its frequencies while a document grows from `begin` to `end` tokens.

    The keys in a cache keep the frequencies of the shorter document.
    """
    for kind, original in _original_lengths(config):
        if end > max(begin, original) and (kind != "longrope" or begin <= original):
            return f"{_beyond(kind, original)}, and it grows from {begin} to {end} tokens while a cache keeps its keys"
    return None


def fix_rope_length(model: nn.Module, tokens: int) -> None:
    """Give all documents the rotary frequencies that transformers gives a document of `tokens` tokens.

    The model then equals transformers' own model for documents of that length and, with longrope, for all documents on
    the same side of the original length. Its configuration is not changed. Raises ValueError for a model without such a
    RoPE.
    """
    check_tokens("tokens", tokens, least=1)
    for module in _length_aware(model):
        if tokens <= module.original and scales_by_position(module.own.config):
            raise ValueError(
                f"a model that also scales by position needs more than {module.original} tokens, got {tokens}"
            )
        module.fixed_length = tokens


def rope_per_document(model: nn.Module) -> None:
    """Make longrope and dynamic RoPE rotate each token by the frequencies that transformers gives its document alone.

    This applies on the ring, where a plan or a RingCache knows the lengths of documents. Elsewhere, transformers' own
    rule stays. Raises ValueError for a model without such a RoPE.
    """
    for module in _length_aware(model):
        module.fixed_length = None


def has_length_dependent_rope(config: PreTrainedConfig) -> bool:
    """Whether all layers of a model have the same RoPE, and it depends on the length."""
    return _depends_on_length(getattr(config, "rope_parameters", None) or {})


def is_length_aware(model: nn.Module) -> bool:
    """Whether `rope_per_document` or `fix_rope_length` has been called for the model."""
    return bool(_replaced(model))


class LengthAwareRotary(nn.Module):
    """Replaces a rotary module, `own`, and uses the lengths of documents if they are known.

    fixed_length: one length for all documents. document: during a call, its plan, or the length of its only document.
    """

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own, self.scaled = own, copy.deepcopy(own)
        self.scaled.rope_type = "default"  # so that no call changes its frequencies
        self.original = _original(own.config, own.config.rope_parameters)
        self.longest = self.original + 1 if own.rope_type == "longrope" else None  # stands for all longer ones
        self.scaled_for = self.original
        self.short = own.original_inv_freq.detach().cpu()
        self.fixed_length: int | None = None
        self.document: AttentionPlan | int | None = None

    @property
    def length(self) -> AttentionPlan | int | None:
        """One length for all documents, or a plan with their lengths; None if they are not known."""
        return self.fixed_length or self.document

    @torch.compiler.disable  # the host divides tokens by the lengths of documents, which differ from step to step
    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        """The result of the family's module for [rows, n] positions, usually (cos, sin), each [rows, n, D].

        Raises RuntimeError in a layer that runs again in the backward, if the documents are not known.
        """
        if self.length is None:
            if torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "RoPE that depends on a document's length is computed in a layer that runs again in the backward: "
                    "call ringflash.models.fix_rope_length(model, N), or do not recompute layers"
                )
            return self.own(x, position_ids)
        (rows, n), positions = position_ids.shape, position_ids.flatten()
        parts = [self._rotated(x, *run) for run in zip(*self._runs(positions, rows), strict=True)]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, dim=1).view(rows, n, -1)
        return tuple(torch.cat(some, dim=1).view(rows, n, -1) for some in zip(*parts, strict=True))

    def _runs(self, positions: Tensor, rows: int) -> tuple[Sequence[Tensor], list[int]]:
        """Runs of positions [n] with the same frequencies, and a document length with these frequencies for each."""
        if isinstance(self.length, AttentionPlan):
            lengths = self.length.document_lengths(rows // len(self.length.ring.local))
        else:
            lengths = torch.tensor([self.length], device="cpu")
        of_runs, counts = lengths.clamp(self.original, self.longest).unique_consecutive(return_counts=True)
        return (positions.split(counts.tolist()) if len(counts) > 1 else [positions]), of_runs.tolist()

    def _rotated(self, x: Tensor, positions: Tensor, length: int) -> Any:
        """The result of the family's own module for positions [n] in documents of this length, in one row."""
        if length != self.scaled_for:
            self.scaled.inv_freq, self.scaled_for = to_device(self._frequencies(length), x.device), length
        last = positions.new_full((1,), length - 1)  # phimoe scales by a call's longest position
        out = self.scaled(x, torch.cat([positions, last])[None])
        return out[:, :-1] if isinstance(out, Tensor) else tuple(part[:, :-1] for part in out)

    def _frequencies(self, length: int) -> Tensor:
        """[D / 2], as transformers computes them for a document alone, in a module that has seen no other."""
        if length <= self.original:
            return self.short
        kind, tokens = self.own.rope_type, torch.tensor(length, device="cpu")
        return ROPE_INIT_FUNCTIONS[kind](self.own.config, torch.device("cpu"), seq_len=tokens)[0]


def _length_aware(model: Any) -> list[LengthAwareRotary]:
    """A model's rotary modules, which this replaces if needed. Raises ValueError if none depends on the length."""
    if not has_length_dependent_rope(model.config):
        kinds = [rope.get("rope_type", "default") for rope in rope_parameters(model.config)]
        raise ValueError(
            f"the model's RoPE is {listed(kinds or ['none'])}; only {listed(LENGTH_DEPENDENT)} depend on the length"
        )
    if not is_length_aware(model):
        for name, module in [*model.named_modules()]:
            if getattr(module, "rope_type", None) in LENGTH_DEPENDENT:
                model.set_submodule(name, LengthAwareRotary(module))
        model.base_model.register_forward_pre_hook(_begin_call, with_kwargs=True)
        model.base_model.register_forward_hook(_end_call, always_call=True)
    return _replaced(model)


def _replaced(model: nn.Module | None) -> list[LengthAwareRotary]:
    return [module for module in model.modules() if isinstance(module, LengthAwareRotary)] if model is not None else []


def _begin_call(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    for module in _replaced(model):
        module.document = kwargs.get("plan") or getattr(kwargs.get("past_key_values"), "rope_length", None)


def _end_call(model: nn.Module, args: Any, out: Any) -> None:
    for module in _replaced(model):
        module.document = None


def _original_lengths(config: PreTrainedConfig) -> list[tuple[str, int]]:
    """The RoPEs that depend on the length, each with the longest document that has its original frequencies."""
    ropes = filter(_depends_on_length, rope_parameters(config))
    return [(rope["rope_type"], _original(config, rope)) for rope in ropes]


def _depends_on_length(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type") in LENGTH_DEPENDENT


def _original(config: PreTrainedConfig, rope: dict[str, Any]) -> int:
    own = rope.get("original_max_position_embeddings") if rope["rope_type"] == "longrope" else None
    return own or config.max_position_embeddings


def _beyond(kind: str, original: int) -> str:
    return f"rope_parameters.rope_type={kind} depends on a document's length beyond {original} tokens"
