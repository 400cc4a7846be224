"""Llama 4's chunks and scales, counted within each document: transformers counts both from a call's first token.

Layers of chunked attention see their chunk of a document alone, an interval of keys (`AttentionPlan.in_chunks`). The
others scale their queries by position, and have no rotary positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ringflash.models.families import has_chunks
from ringflash.models.layers import chunk_size
from ringflash.models.ring_mask import RingMask
from ringflash.ring.plan import AttentionPlan


def by_layer_type(mask: RingMask, config: PreTrainedConfig) -> RingMask | dict[str, RingMask]:
    """The mask; by type of layers where some have chunked attention, for which transformers would read it."""
    return dict.fromkeys(config.layer_types, mask) if has_chunks(config.model_type) else mask


def of_layer(plan: AttentionPlan, module: Any) -> AttentionPlan:
    """The plan of an attention module, which may be limited to chunks."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    size = None if config is None or layer is None else chunk_size(config, layer)
    return plan if size is None else plan.in_chunks(size)


def scaled_in_document(module: Any, query: Tensor, plan: AttentionPlan) -> Tensor:
    """query [rows, Hq, n, D] scaled by places in documents, as a Llama 4 layer has scaled it by places in a call."""
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query
    rows, _, n, _ = query.shape
    of_document = plan.position_ids(rows // len(plan.ring.local))
    of_call = torch.arange(n, device=query.device)
    ratio = _scale(module, of_document) / _scale(module, of_call)
    return (query * ratio[:, None, :, None]).to(query.dtype)


def _scale(module: Any, positions: Tensor) -> Tensor:
    """As in transformers' Llama4TextAttention, 1 or more."""
    return torch.log1p(torch.floor((positions.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
