"""Llama 4's chunks and query scales, counted within each document; transformers counts both from a call's first token.

Layers with chunked attention see only their chunk of a document, which is an interval of keys
(`AttentionPlan.in_chunks`). The other layers scale their queries by position and have no rotary positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringflash.models.layers import chunk_size
from ringflash.ring.plan import AttentionPlan


def of_layer(plan: AttentionPlan, module: Any) -> AttentionPlan:
    """The plan of an attention module, which may be limited to chunks."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    size = None if config is None or layer is None else chunk_size(config, layer)
    return plan if size is None else plan.in_chunks(size)


def scaled_in_document(module: Any, query: Tensor, plan: AttentionPlan) -> Tensor:
    """query [rows, Hq, n, D], which a Llama 4 layer scaled by positions in the call, scaled by those in documents."""
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
