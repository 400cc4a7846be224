"""ring_inputs: a rank's model inputs, from whole sequences that are the same on every rank of the ring."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ringflash.intervals import on_cpu
from ringflash.layout import LAYOUT_NAMES, Layout
from ringflash.mask import IntervalMask, cumulative_hint, document_rows
from ringflash.models.configuration import refusal
from ringflash.models.families import has_chunks, recurrence_of
from ringflash.models.layers import layer_masks, state_heads, state_refusal
from ringflash.models.linear_attention import put_on_ring
from ringflash.models.linear_kernels import device_refusal
from ringflash.models.ring_mask import RingMask
from ringflash.ring.collectives import REFUSED, agree, checksum
from ringflash.ring.cost import INTER_NODE_GB, INTRA_NODE_GB, Machine, fastest
from ringflash.ring.plan import AttentionPlan
from ringflash.ring.transport import Loopback, ProcessRing, Ring
from ringflash.ring.ulysses import Ulysses

_IGNORE = -100  # the label that transformers' loss skips
_COMPARED = "input_ids, labels, documents, leading_tokens and layout"


@on_cpu
def ring_inputs(
    input_ids: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    *,
    ring: Ring,
    ulysses: Ulysses | None = None,
    documents: Sequence[Any] | np.ndarray | Tensor | None = None,
    leading_tokens: int = 0,
    layout: str | Callable[[IntervalMask], Layout] = "zigzag",
    config: PreTrainedConfig | None = None,
    shift_labels: Tensor | None = None,
    compare_ranks: bool = True,
) -> dict[str, Any]:
    """This rank's keyword arguments for a causal language model's forward, from whole sequences.

    - input_ids, labels: int64 [B, S], the same on every rank of the ring. Labels are not shifted yet. S need not divide
      among the ranks.
    - ring, ulysses: the ranks that share the sequences, as in `AttentionPlan`.
    - documents: token counts of packed documents, which sum to S: one list, or one per row (or arrays or tensors of
      integers). No token sees or predicts a token of another document, and positions start from 0 in each. They are
      cu_seqlens.diff() where flash_attn's cu_seqlens are at hand.
    - leading_tokens: number of tokens at the start of each document that layers with a sliding window also see.
    - layout: "contiguous", "zigzag", "striped", "balanced", "document_local", or "auto", which has the least predicted
      time for these documents and the layers of `config`; or a function that returns a mask's layout.
    - config: model.config. If given, a model that cannot run on the ring is refused here, even if it reads no mask.
      Layers with chunked or linear attention need it.
    - shift_labels: int64 [B, S], labels that are already shifted, instead of `labels`.
    - compare_ranks: raise an error if ranks were given different sequences. This is a collective; without it,
      ring_inputs may run in a thread while the ring is in use.

    The loss of the model is then this rank's share of the mean: summed over the ring, it is the loss of the batch.

    All ranks of the ring call this together, and with compare_ranks not while another thread uses the ring. Raises
    ValueError or TypeError naming an argument that does not fit, also if it is another rank's or differs between ranks,
    so that no rank waits for one that raised. Raises RuntimeError in a DataLoader worker.
    """
    groups = _process_groups(ring, ulysses)
    try:
        ids, targets = _checked_tokens(input_ids, labels, shift_labels)
        document = _documents_mask(documents, *ids.shape)
        neighbours = 1 if ulysses is None else ulysses.size
        _check_config(config, ring.size * neighbours, ring.device)
        mask = IntervalMask.causal(document.queries) & document
        plan = AttentionPlan(mask, _layout(layout, mask, ring, neighbours, config), ring, ulysses, leading_tokens)
    except (ValueError, TypeError):
        if compare_ranks:
            agree(_COMPARED, torch.tensor(REFUSED, device=ring.device), groups)
        raise
    if compare_ranks:
        leading = torch.tensor([min(leading_tokens, ids.shape[1])])
        given = checksum(ring.device, ids, targets, document.lo, document.hi, plan.layout.chunks, leading)
        agree(_COMPARED, given, groups)
    if targets is not None and shift_labels is None:
        targets = _shifted(targets, document)
    return _model_inputs(ids, targets, plan, config)


def _process_groups(ring: Ring, ulysses: Ulysses | None) -> list[ProcessRing | Ulysses]:
    """The groups that share the sequences. Raises TypeError if `ring` is not a ring, RuntimeError in a worker."""
    if not hasattr(ring, "exchange") or isinstance(ring, type):
        raise TypeError(f"ring must be a ProcessRing or a Loopback, got {ring!r:.100}")
    groups = [group for group in (ring, ulysses) if isinstance(group, ProcessRing | Ulysses)]
    for group in groups:
        group.process.check()
    return groups


def _model_inputs(
    ids: Tensor, targets: Tensor | None, plan: AttentionPlan, config: PreTrainedConfig | None
) -> dict[str, Any]:
    """This rank's keywords of the model's forward, from whole ids and shifted targets, both [B, S]."""
    keywords: dict[str, Any] = {}
    count = None
    if targets is not None:
        held, count = plan.shard(targets, _IGNORE), int((targets != _IGNORE).sum())
        keywords = {"labels": held, "shift_labels": held, "num_items_in_batch": max(1, count)}  # no label: a loss of 0
    shard = plan.shard(ids)
    stand_in = RingMask(shard.shape, count, plan.ring.device, plan=plan)
    if config is not None and state_heads(config) is not None:
        plan.sequences(len(ids))
    return keywords | {
        "input_ids": shard,
        "position_ids": plan.position_ids(len(ids)),
        "attention_mask": stand_in if config is None else _by_layer_type(stand_in, config),
        "plan": plan,
        "use_cache": False,
    }


def _shifted(labels: Tensor, document: IntervalMask) -> Tensor:
    """Labels [B, S] shifted within documents: each token gets the next one's; the last of a document gets none."""
    last = document.hi <= torch.arange(1, document.queries + 1)
    return labels.roll(-1, dims=1).masked_fill(last.to(labels.device), _IGNORE)


def _by_layer_type(mask: RingMask, config: PreTrainedConfig) -> RingMask | dict[str, RingMask]:
    """The mask, or a dictionary of it by layer type for families of whose layers transformers would read a mask."""
    if recurrence_of(config.model_type) is not None:
        return dict.fromkeys(("full_attention", "linear_attention"), mask)
    return dict.fromkeys(config.layer_types, mask) if has_chunks(config.model_type) else mask


def _check_config(config: Any, ranks: int, device: torch.device) -> None:
    """Refuse models that cannot run on the ring, and get linear attention ready for it.

    Some (RWKV, xLSTM, CPM-Ant) read no mask that could refuse them. ranks: those that share a sequence.
    """
    if config is None:
        return
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"config must be model.config, a transformers configuration, got {type(config).__name__}")
    if (reason := refusal(config) or state_refusal(config, ranks) or device_refusal(config, device)) is not None:
        raise ValueError(f"config.{reason}")
    put_on_ring(config)


def _layout(
    name: str | Callable[[IntervalMask], Layout],
    mask: IntervalMask,
    ring: Ring,
    ulysses: int,
    config: PreTrainedConfig | None,
) -> Layout:
    """The layout of a mask, by name or function. "auto" assumes the machine that torchrun's environment describes."""
    if callable(name):
        return name(mask)
    if name not in (names := ("auto", *LAYOUT_NAMES)):
        shown = name[:100] if isinstance(name, str) else f"an object of {type(name)}"
        raise ValueError(f"layout={shown} is not one of {', '.join(names)}")
    if name != "auto":
        return Layout.of(name, mask, ring.size, ulysses)
    if config is None:
        raise ValueError('layout="auto" needs config=model.config: its heads and windows decide what is fastest')
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ring.size * ulysses))
    within = isinstance(ring, Loopback) or here % (ring.size * ulysses) == 0
    machine = Machine.of(ring.device, INTRA_NODE_GB if within else INTER_NODE_GB)
    return fastest(layer_masks(config, mask), ring.size, machine, ulysses)[1]


def _checked_tokens(input_ids: Any, labels: Any, shift_labels: Any) -> tuple[Tensor, Tensor | None]:
    """input_ids, and whichever labels were given, as tensors [B, S].

    Raises ValueError or TypeError for what is not [B, S], or of two shapes: shards are padded, which would hide it.
    """
    if labels is not None and shift_labels is not None:
        raise ValueError("labels and shift_labels were both given: shift_labels are labels, shifted already")
    # What torch's embedding and cross entropy take. They would refuse the rest too, but name neither argument.
    ids = _integers("input_ids", input_ids, (torch.int64, torch.int32))
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"input_ids must be [B, S] with a token or more, got {[*ids.shape]}")
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    if given is None:
        return ids, None
    targets = _integers(name, given, (torch.int64,))
    if targets.shape != ids.shape:
        raise ValueError(f"{name} {[*targets.shape]} must have the shape of input_ids, {[*ids.shape]}")
    return ids, targets


def _integers(name: str, x: Any, taken: Sequence[torch.dtype]) -> Tensor:
    if isinstance(x, np.ndarray) and x.dtype in (np.int64, np.int32):
        x = torch.tensor(np.ascontiguousarray(x))  # torch takes no array that runs backwards
    if not isinstance(x, Tensor) or x.dtype not in taken:
        kind = x.dtype if isinstance(x, Tensor | np.ndarray) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of {' or '.join(map(str, taken))}, got {kind}")
    return x


def _documents_mask(documents: Any, rows: int, length: int) -> IntervalMask:
    """The mask of packed documents. Raises ValueError for counts that leave tokens out."""
    if documents is None:
        return IntervalMask.full(length)
    counts, alike = document_rows(documents)
    if len(counts) not in (1, rows):
        raise ValueError(f"documents has lists for {len(counts)} rows, input_ids has {rows} rows")
    for row, lengths in enumerate(counts):
        if (total := sum(lengths)) != length:
            raise ValueError(
                f"sum(documents{'' if alike else f'[{row}]'})={total} must be the {length} tokens of a row of "
                f"input_ids{cumulative_hint(lengths, length)}; padding is a document of its own, its labels {_IGNORE}"
            )
    return IntervalMask.documents(counts, length)
