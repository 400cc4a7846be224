"""The attention and the mask that transformers calls under the name "ring", registered on import."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from ringflash.mask import check_tokens
from ringflash.models.cache import pop_pending
from ringflash.models.checks import check_call, check_keywords
from ringflash.models.configuration import BIDIRECTIONAL, refusal
from ringflash.models.layers import first_attention
from ringflash.models.linear_attention import put_on_ring
from ringflash.models.llama4 import of_layer, scaled_in_document
from ringflash.models.ring_mask import RingMask
from ringflash.models.rope import scales_by_position
from ringflash.models.rope_length import length_refusal
from ringflash.models.router_loss import share_router_loss
from ringflash.ring.attention import ring_attention
from ringflash.ring.plan import AttentionPlan

_OTHER_MASK = (
    "a layer's mask is neither causal nor a sliding window alone, and the plan has no other: chunks, and tokens that "
    "see those after them, are not supported on the ring"
)


@torch.compiler.disable  # streams and exchanges cannot be part of a compiled graph
def ring_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    plan: AttentionPlan | None = None,
    kernel: str = "auto",
    deterministic: bool = False,
    compensated: bool = True,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """A layer's attention: query [B, Hq, S, D], key and value [B, Hkv, S, D] to ([B, S, Hq, D], None).

    s_aux is transformers' name for attention sinks, [Hq].

    Raises ValueError naming an argument that is not supported, or `plan` if it is missing.
    """
    pending = pop_pending()
    _check_layer(module, attention_mask, dropout, unknown)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap or None, "sink": s_aux}
    if pending is not None:
        if plan is not None:
            raise ValueError("plan= and past_key_values=RingCache were both given: a plan trains, a cache generates")
        cache, layer_idx = pending
        _check_cached(module, layer_idx, attention_mask)
        q, k, v = _by_token(query, key, value)
        return cache.attend(layer_idx, q, k, v, _window(attention_mask, sliding_window), **options), None
    if not isinstance(plan, AttentionPlan):
        raise ValueError(
            f'attn_implementation="ring" needs plan=, an AttentionPlan, got {plan!r:.100}: call the model with what '
            f"ringflash.models.ring_inputs returns; to generate, give past_key_values=RingCache(model, capacity=N) and "
            f'no plan; to use it without a ring, call model.set_attn_implementation("sdpa")'
        )
    recomputed = torch._C._current_graph_task_id() != -1  # in a backward; the layer was checked when it first ran
    if _is_first(module) and not recomputed:
        _check_forward(module, attention_mask, plan, unknown)
    query, plan = scaled_in_document(module, query, plan), of_layer(plan, module)
    if (window := _window(attention_mask, sliding_window)) is not None:
        plan = plan.window(check_tokens("sliding_window", window, least=1) - 1)
    q, k, v = _by_token(query, key, value)
    out = ring_attention(
        q, k, v, plan, **options, kernel=kernel, deterministic=deterministic,
        compensated=compensated, layer=getattr(module, "layer_idx", None),
    )  # fmt: skip
    return out, None


def _check_cached(module: nn.Module, layer_idx: int, mask: Tensor | RingMask | None) -> None:
    """Raise ValueError for another layer than the one whose cache was just updated, and for other masks."""
    if (here := getattr(module, "layer_idx", layer_idx)) != layer_idx:
        raise ValueError(f"layer {here} attends after the cache of layer {layer_idx} was updated: not supported")
    if isinstance(mask, RingMask) and mask.other:
        raise ValueError(_OTHER_MASK)


def _by_token(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """The tensors as [B, S, H, D] instead of [B, H, S, D], in one dtype."""
    tensors = [x.transpose(1, 2) for x in (query, key, value)]
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and len({x.dtype for x in tensors}) > 1:  # RoPE gives fp32
        return [x.to(torch.get_autocast_dtype(kind)) for x in tensors]
    return tensors


def _check_layer(module: nn.Module, attention_mask: Tensor | RingMask | None, dropout: float, unknown: dict) -> None:
    """Raise ValueError for layers, and keywords of their calls, whose results would be wrong on shards."""
    config = getattr(module, "config", None)
    if config is not None and (reason := refusal(config)) is not None:
        raise ValueError(f"config.{reason}")
    if not getattr(module, "is_causal", True):
        raise ValueError(BIDIRECTIONAL)
    if dropout:
        raise ValueError(f"attention_dropout={dropout} is not supported by ring attention; set it to 0")
    check_keywords(attention_mask, unknown)


def _is_first(module: nn.Module) -> bool:
    """Whether this is the model's first layer with attention."""
    config: Any = getattr(module, "config", None)
    return getattr(module, "layer_idx", 0) == (0 if config is None else first_attention(config))


def _check_forward(
    module: nn.Module, attention_mask: Tensor | RingMask | None, plan: AttentionPlan, unknown: dict[str, Any]
) -> None:
    """The checks of a whole forward, in its first layer: the call of the model, the plan's length, the positions."""
    share_router_loss(module)
    mask = attention_mask if isinstance(attention_mask, RingMask) else None
    call = check_call(plan, mask, unknown.get("shift_labels"), unknown.get("num_items_in_batch"))
    position_ids = unknown.get("position_ids", call.arguments.get("position_ids") if call else None)
    config: Any = getattr(module, "config", None)
    if config is not None and put_on_ring(config):
        raise ValueError(
            f"model_type={config.model_type} needs ring_inputs(config=model.config): it has linear attention"
        )
    if reason := config and length_refusal(config, plan.layout.length, call.owner if call else None):
        raise ValueError(f"config.{reason}")
    if position_ids is not None:
        _check_positions(position_ids, plan, config and scales_by_position(config))


def _window(mask: Tensor | RingMask | None, asked: int | None) -> int | None:
    """A layer's sliding window: that of its mask, which is all that eager attention reads. asked: the keyword's."""
    if not isinstance(mask, RingMask) or asked == mask.window:
        return asked
    if asked is not None:
        raise ValueError(
            f"a layer asks for sliding_window={asked} and transformers gave it a mask of window {mask.window}: which "
            f"of the two its weights were trained with is not known"
        )
    return mask.window


def _check_positions(position_ids: Tensor, plan: AttentionPlan, of_document_alone: bool) -> None:
    """Raise ValueError for positions that count neither within the sequence nor within documents.

    transformers' default is such a case: it counts from 0 on every shard. On a GPU, the device compares and aborts the
    program, so that the host does not wait.
    """
    message = "position_ids must count from the beginning of each document (plan.position_ids)" + (
        ", by which this model scales queries or keys" if of_document_alone else " or of the sequence"
    )
    rows, ranks, positions = len(position_ids), len(plan.ring.local), plan.positions
    fits = rows == 1 or (rows % ranks == 0 and plan.batch in (1, rows // ranks))
    if not fits or position_ids.shape[-1] != positions.shape[-1]:
        raise ValueError(
            f"position_ids {[*position_ids.shape]} do not fit the plan, of {ranks} local ranks, {plan.batch} batch "
            f"rows and {positions.shape[-1]} tokens per shard: a plan is for the inputs that it was made with"
        )
    of_sequence, of_document = positions.repeat_interleave(max(1, rows // positions.shape[1]), dim=1)
    past_end = of_sequence >= plan.layout.length
    right = (position_ids == of_document) | past_end
    right = (right if of_document_alone else right | (position_ids == of_sequence)).all()
    if right.is_cuda:
        torch._assert_async(right, message)
    elif not right:
        raise ValueError(message)


def _ring_mask(
    *args: Any,
    attention_mask: Tensor | RingMask | None = None,
    config: PreTrainedConfig | None = None,
    mask_function: Callable = causal_mask_function,
    local_size: int | None = None,
    batch_size: int,
    q_length: int,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> RingMask:
    """The mask that transformers passes to layers: that of ring_inputs, which raises in layers off the ring.

    transformers does not build a mask. One that hides tokens is refused, since ring attention would ignore it.
    local_size: the layers' window.
    """
    if config is not None and (reason := refusal(config)) is not None:
        raise ValueError(f"config.{reason}")
    if mask_function is bidirectional_mask_function:
        raise ValueError(BIDIRECTIONAL)
    shape = torch.Size([batch_size, q_length])
    other = not _only_windowed(mask_function, local_size)
    if not isinstance(attention_mask, RingMask):
        if attention_mask is not None and not bool(attention_mask.all()):
            hidden = int((~attention_mask.bool()).sum())
            raise ValueError(
                f"attention_mask hides {hidden} tokens: padding masks are not supported; pack documents instead of "
                f"padding"
            )
        return RingMask(shape, device=device, window=local_size, other=other)
    if attention_mask.shape != shape:
        raise ValueError(
            f"a model's input of {[*shape]} does not fit the others, which ring_inputs made for "
            f"{[*attention_mask.shape]}: each batch needs a plan of its own, and prompts cannot be put in front"
        )
    if other:
        raise ValueError(_OTHER_MASK)
    return attention_mask.windowed(local_size)


def _only_windowed(mask_function: Callable, window: int | None) -> bool:
    """Whether a mask function of transformers is causal, and limited only by a window of `window` tokens.

    Three (query, key) pairs tell: a window hides key 0 from query `window`, but not key 1; a chunk of `window` tokens
    hides both; a mask that is not causal shows key 1 to query 0.
    """
    if window is None or not 0 < window < 2**31:
        return mask_function is causal_mask_function or window is not None
    queries, keys = (torch.tensor(x, device="cpu") for x in ((window, window, 0), (1, 0, 1)))
    seen = [bool(mask_function(0, 0, q, k)) for q, k in zip(queries, keys, strict=True)]
    return seen == [True, False, False]


def _refuse_architecture(config: PreTrainedConfig, *args: Any, **kwargs: Any) -> NoReturn:
    """Replaces a layer's class in tables that models look up by the name of the attention. Raises ValueError."""
    raise ValueError(f"config.{refusal(config)}")


AttentionInterface.register("ring", ring_attention_forward)
AttentionMaskInterface.register("ring", _ring_mask)
for _name in ("falcon", "git", "gpt_neo", "gptj"):
    _module = importlib.import_module(f"transformers.models.{_name}.modeling_{_name}")
    for _table in (table for name, table in vars(_module).items() if name.endswith("_ATTENTION_CLASSES")):
        _table["ring"] = _refuse_architecture
