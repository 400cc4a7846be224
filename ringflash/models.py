"""Hugging Face models on the ring: attn_implementation="ring".

Importing this module registers "ring" with transformers, and has gradient_checkpointing_enable keep attention's results
for such models. A model then takes a shard of each sequence and, as the
keyword `plan`, the step's AttentionPlan, which its attention layers hand to `ring_attention`:

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="ring")
    loss = model(**ring_inputs(input_ids, labels, ring=ProcessRing())).loss     # sums over ranks to the mean loss

The plan is the mask. Whatever else transformers could use to change a mask (padding masks, dropout, a cache, keywords
this file does not know) is refused by name, and so is a model that would come out wrong on shards: one of another
architecture, whose layers may mix tokens by other means than attention, or one whose loss or positions need them all.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function
from transformers.modeling_utils import AttentionInterface

from ringflash import kernels
from ringflash.architecture import refused, token_refusal, value_refusal, words_of
from ringflash.errors import ConfigError
from ringflash.kernels import FASTEST_FIRST
from ringflash.layout import LAYOUT_NAMES, Layout
from ringflash.mask import IntervalMask, document_rows, tokens
from ringflash.model_checks import check_call
from ringflash.ring.attention import ring_attention
from ringflash.ring.cost import INTER_NODE_GB, INTRA_NODE_GB, Heads, Machine, fastest
from ringflash.ring.plan import AttentionPlan
from ringflash.ring.recompute import keep_attention
from ringflash.ring.transport import Loopback, ProcessRing, Ring
from ringflash.ring.ulysses import Ulysses
from ringflash.ring_mask import RingMask

# Architectures whose training is tested against their own sdpa attention.
ARCHITECTURES = ("gemma2", "gpt_oss", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
DTYPES = {
    "auto": torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}

_BIDIRECTIONAL = (
    "is_causal=False is not supported on the ring: ring_inputs makes causal plans, and tokens would not see those "
    "after them; load a causal model, or train this one without a ring"
)
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_IGNORE = -100  # the label that transformers' loss skips
_REFUSED = -1  # no checksum: what a rank was given does not fit
# What transformers passes to every attention function and what does not change attention.
_HARMLESS = {
    "cache_position", "logits_to_keep", "num_items_in_batch", "output_attentions", "output_hidden_states",
    "position_ids", "return_dict", "shift_labels", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained. One of `path` and `architecture` is set."""

    path: str | None = None
    """Folder of a Hugging Face model to start from; null: start from random weights."""

    architecture: dict[str, Any] = field(default_factory=dict)
    """A transformers configuration: model_type (one of ARCHITECTURES) and that configuration's own fields."""

    dtype: str = "auto"
    """Weights and activations: bf16 (fp32 master weights), fp32, or auto: bf16 on a GPU, fp32 without one."""

    kernel: str = "auto"
    """Attention kernel: auto (the fastest that fits), hopper (Gluon), portable (Triton) or blocked (plain torch)."""

    deterministic: bool = False
    """Gradients of attention bit-equal from run to run, so that a resumed run is too. Costs speed on Hopper; the other
    kernels are always so."""

    compensated: bool = True
    """Gradients of 16-bit attention do not suffer from the rounding of its result. Costs a little speed and memory."""

    extrapolate_positions: bool = False
    """Train on sequences longer than the model's positions (max_position_embeddings, or what its RoPE scales to)."""

    @property
    def attention(self) -> dict[str, Any]:
        """The settings that every layer's attention is called with."""
        return {"kernel": self.kernel, "deterministic": self.deterministic, "compensated": self.compensated}

    def __post_init__(self) -> None:
        if self.path and self.architecture:
            raise ConfigError(
                f"model.path={self.path} and model.architecture with {len(self.architecture)} fields: "
                f"set one of the two (model=pretrained has a path and no architecture)"
            )
        if not self.path and not self.architecture:
            raise ConfigError(
                "model.path is not set: model=pretrained starts from model.path=FOLDER, a Hugging Face model"
            )
        if self.kernel not in ("auto", *FASTEST_FIRST):
            raise ConfigError(f"model.kernel={self.kernel} is not one of auto, {', '.join(FASTEST_FIRST)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"model.dtype={self.dtype} is not one of {', '.join(DTYPES)}")


# -- the attention that transformers calls


@torch.compiler.disable  # a compiled model runs it as it is, between graphs: streams and exchanges are part of none
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

    Raises ValueError naming what it does not support, or `plan` where it is missing.
    """
    _check_layer(module, attention_mask, dropout, unknown)
    if not isinstance(plan, AttentionPlan):
        raise ValueError(
            f'attn_implementation="ring" needs plan=, an AttentionPlan, got {plan!r:.100}: call the model with what '
            f"ringflash.models.ring_inputs returns; to generate, or to use it without a ring, load it with "
            f'attn_implementation="sdpa", or call model.set_attn_implementation("sdpa")'
        )
    if getattr(module, "layer_idx", 0) == 0:
        mask = attention_mask if isinstance(attention_mask, RingMask) else None
        check_call(plan, mask, unknown.get("shift_labels"), unknown.get("num_items_in_batch"))
        if (position_ids := unknown.get("position_ids")) is not None:
            _check_positions(position_ids, plan)
    if sliding_window is not None:
        plan = plan.window(tokens("sliding_window", sliding_window, least=1) - 1)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if torch.is_autocast_enabled(q.device.type) and not q.dtype == k.dtype == v.dtype:  # rotated in fp32, projected not
        q, k, v = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (q, k, v))
    out = ring_attention(
        q, k, v, plan, scale=scaling, softcap=softcap or None, sink=s_aux, kernel=kernel, deterministic=deterministic,
        compensated=compensated, layer=getattr(module, "layer_idx", None),
    )  # fmt: skip
    return out, None


def _check_layer(module: nn.Module, attention_mask: Tensor | RingMask | None, dropout: float, unknown: dict) -> None:
    """Refuse what a layer is, or is asked for in unknown keywords, that would come out wrong on shards."""
    config = getattr(module, "config", None)
    if config is not None and (reason := refusal(config, unknown.pop("output_router_logits", None))) is not None:
        raise ValueError(f"config.{reason}")
    if not getattr(module, "is_causal", True):
        raise ValueError(_BIDIRECTIONAL)
    if attention_mask is not None and not isinstance(attention_mask, RingMask):
        raise ValueError(f"attention_mask {[*attention_mask.shape]} is not supported: plan says who sees whom")
    if dropout:
        raise ValueError(f"attention_dropout={dropout} is not supported by ring attention; set it to 0")
    refused = {name: value for name, value in unknown.items() if name not in _HARMLESS and value is not None}
    if "labels" in refused:
        raise ValueError("labels went to a model that makes no loss of them: call it without labels")
    if refused:
        name, value = next(iter(refused.items()))
        told = [*value.shape] if isinstance(value, Tensor) else f"{value!r:.100}"
        raise ValueError(f"{name}={told} is not supported by ring attention: it may change who sees whom")
    if unknown.get("output_attentions"):
        raise ValueError("output_attentions=True is not supported: ring attention has no weights to return")


def _check_positions(position_ids: Tensor, plan: AttentionPlan) -> None:
    """Refuse positions that are neither the sequence's nor a document's own, such as those that transformers makes up
    for lack of any, counted from 0 on every shard.

    On a GPU the comparison is left to the device, which stops the program: nothing waits for it here.
    """
    told = "position_ids must count from the beginning of each document (plan.position_ids) or of the sequence"
    rows, ranks, places = len(position_ids), len(plan.ring.local), plan.places
    fits = rows == 1 or (rows % ranks == 0 and plan.batch in (1, rows // ranks))
    if not fits or position_ids.shape[-1] != places.shape[-1]:
        raise ValueError(
            f"position_ids {[*position_ids.shape]} do not fit the plan, of {ranks} local ranks, {plan.batch} batch "
            f"rows and {places.shape[-1]} tokens per shard: a plan is for the inputs that it was made with"
        )
    of_sequence, of_document = places.repeat_interleave(max(1, rows // places.shape[1]), dim=1)
    past_end = of_sequence >= plan.layout.length
    right = ((position_ids == of_sequence) | (position_ids == of_document) | past_end).all()
    if right.is_cuda:
        torch._assert_async(right, told)
    elif not right:
        raise ValueError(told)


def _ring_mask(
    *args: Any,
    attention_mask: Tensor | RingMask | None = None,
    config: PreTrainedConfig | None = None,
    mask_function: Callable | None = None,
    batch_size: int,
    q_length: int,
    **kwargs: Any,
) -> RingMask | None:
    """The mask that transformers gives to layers: that of ring_inputs, so that a layer off the ring refuses it.

    transformers builds none. One that hides tokens is refused, since nothing here would honour it.
    """
    if config is not None and (reason := refusal(config, router_logits=False)) is not None:
        raise ValueError(f"config.{reason}")
    if mask_function is bidirectional_mask_function:
        raise ValueError(_BIDIRECTIONAL)
    if isinstance(attention_mask, RingMask):
        if attention_mask.shape != (shape := torch.Size([batch_size, q_length])):
            raise ValueError(
                f"a model's input of {[*shape]} does not fit the others, which ring_inputs made for "
                f"{[*attention_mask.shape]}: each batch needs a plan of its own, and prompts cannot be put in front"
            )
        return attention_mask
    if attention_mask is not None and not bool(attention_mask.all()):
        hidden = int((~attention_mask.bool()).sum())
        raise ValueError(
            f"attention_mask hides {hidden} tokens: padding masks are not supported; pack documents instead of padding"
        )
    return None


AttentionInterface.register("ring", ring_attention_forward)
AttentionMaskInterface.register("ring", _ring_mask)


_enable_checkpointing = PreTrainedModel.gradient_checkpointing_enable


@functools.wraps(_enable_checkpointing)
def _keep_attention_in_checkpoints(
    self: PreTrainedModel, gradient_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
) -> None:
    """transformers' own, by which the layers of a model on the ring keep attention's result.

    Its caller may be transformers' Trainer, which knows nothing of a ring; without this, recomputing a layer would send
    keys round again. Raises ValueError for use_reentrant=True and another context_fn, which leave no place to keep
    anything. A model that gets this attention later needs the call again, as its first backward then says.
    """
    if self.config._attn_implementation == "ring":
        ours = {"use_reentrant": False, "context_fn": keep_attention}
        given = {name: x for name, x in (gradient_checkpointing_kwargs or {}).items() if x is not None}
        for name, value in ours.items():
            if given.get(name, value) is not value:
                raise ValueError(
                    f'gradient_checkpointing_kwargs={{"{name}": {given[name]!r}}} is not supported by ring attention: '
                    f"recomputing a layer would run the ring again; leave it out"
                )
        gradient_checkpointing_kwargs = given | ours
    _enable_checkpointing(self, gradient_checkpointing_kwargs, *args, **kwargs)


PreTrainedModel.gradient_checkpointing_enable = _keep_attention_in_checkpoints  # type: ignore[method-assign]


def ring_inputs(
    input_ids: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    *,
    ring: Ring,
    ulysses: Ulysses | None = None,
    documents: Sequence[Any] | np.ndarray | Tensor | None = None,
    first: int = 0,
    layout: str = "zigzag",
    config: PreTrainedConfig | None = None,
) -> dict[str, Any]:
    """This rank's keyword arguments for a causal language model's forward, from whole sequences.

    input_ids, labels: int64 [B, S], the same on every rank of the ring, labels not yet shifted; any S will do for any
    ring. documents: token counts of packed documents that sum to S, one list or one per row (arrays and tensors of
    integers too); no token sees or predicts another document's, and positions begin again with each.
    first: how many of a document's first tokens layers with a sliding window see besides it.
    layout: "contiguous", "zigzag", "striped", "balanced", "gathered", or "auto", the one with the least predicted time
    for these documents and the layers of `config`, the model's.

    The returned loss is this rank's share of the mean: summed over the ring it is the loss of the whole batch.

    A collective: every rank of the ring calls it, and none while another thread uses the ring. Raises ValueError or
    TypeError naming the argument that does not fit; where all fit on every rank, but are not the same; and, for the
    others not to wait in vain, where another rank's do not fit. Raises RuntimeError in a DataLoader's worker.
    """
    if not hasattr(ring, "exchange") or isinstance(ring, type):
        raise TypeError(f"ring must be a ProcessRing or a Loopback, got {ring!r:.100}")
    shared = [group for group in (ring, ulysses) if isinstance(group, ProcessRing | Ulysses)]
    for group in shared:
        group.process.check()
    with torch.device("cpu"):  # plans are made there, whatever device torch.set_default_device names
        try:
            input_ids, labels = _checked_tokens(input_ids, labels)
            rows, length = input_ids.shape
            document = _documents_mask(documents, rows, length)
            mask = IntervalMask.causal(length) & document
            chosen = _layout(layout, mask, ring, 1 if ulysses is None else ulysses.size, config)
            plan = AttentionPlan(mask, chosen, ring, ulysses, first)
        except (ValueError, TypeError):
            _agree(torch.tensor(_REFUSED, device=ring.device), shared)
            raise
        given = (input_ids, labels, document.lo, document.hi, chosen.chunks, torch.tensor([min(first, length)]))
        _agree(_checksum(ring.device, *given), shared)
        targets, count = ({}, None) if labels is None else _shard_labels(labels, document, plan)
        ids = plan.shard(input_ids)
        return targets | {
            "input_ids": ids,
            "position_ids": plan.position_ids(rows),
            "attention_mask": RingMask(ids.shape, count, ring.device),
            "plan": plan,
            "use_cache": False,
        }


def _shard_labels(labels: Tensor, document: IntervalMask, plan: AttentionPlan) -> tuple[dict[str, Any], int]:
    """The labels held here, shifted in whole sequences, as keywords of a model; and how many there are on all ranks."""
    last = document.hi <= torch.arange(1, document.queries + 1)
    shifted = labels.roll(-1, dims=1).masked_fill(last.to(labels.device), _IGNORE)
    held = plan.shard(shifted, _IGNORE)
    count = max(1, int((shifted != _IGNORE).sum()))  # where nothing is predicted: a loss of 0
    return {"labels": held, "shift_labels": held, "num_items_in_batch": count}, count


def _layout(name: str, mask: IntervalMask, ring: Ring, parts: int, config: PreTrainedConfig | None) -> Layout:
    """The layout that ring_inputs was asked for; "auto" reckons with a machine as torchrun describes it."""
    if name not in (names := ("auto", *LAYOUT_NAMES)):
        told = name[:100] if isinstance(name, str) else f"an object of {type(name)}"
        raise ValueError(f"layout={told} is not one of {', '.join(names)}")
    if name != "auto":
        return Layout.of(name, mask, ring.size, parts)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f'layout="auto" needs config=model.config, a transformers configuration, got {type(config).__name__}: its '
            f"heads and windows decide what is fastest"
        )
    if (reason := refusal(config, router_logits=False)) is not None:
        raise ValueError(f"config.{reason}")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ring.size * parts))
    within = isinstance(ring, Loopback) or here % (ring.size * parts) == 0
    machine = Machine.of(ring.device, INTRA_NODE_GB if within else INTER_NODE_GB)
    return fastest(layer_masks(config, mask), ring.size, heads_of(config, parts), machine, parts)[1]


def _checked_tokens(input_ids: Any, labels: Any) -> tuple[Tensor, Tensor | None]:
    """Both as tensors. Refuses what is not [B, S], or not alike, before it is cut into shards, whose shapes would no
    longer tell."""
    # What torch's embedding and cross entropy take. They would refuse the rest too, but name neither argument.
    ids = _integers("input_ids", input_ids, (torch.int64, torch.int32))
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"input_ids must be [B, S] with a token or more, got {[*ids.shape]}")
    if labels is None:
        return ids, None
    targets = _integers("labels", labels, (torch.int64,))
    if targets.shape != ids.shape:
        raise ValueError(f"labels {[*targets.shape]} must have the shape of input_ids, {[*ids.shape]}")
    return ids, targets


def _integers(name: str, x: Any, taken: Sequence[torch.dtype]) -> Tensor:
    if isinstance(x, np.ndarray) and x.dtype in (np.int64, np.int32):
        x = torch.tensor(np.ascontiguousarray(x))  # torch takes no array that runs backwards
    if not isinstance(x, Tensor) or x.dtype not in taken:
        kind = x.dtype if isinstance(x, Tensor | np.ndarray) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of {' or '.join(map(str, taken))}, got {kind}")
    return x


def _documents_mask(documents: Any, rows: int, length: int) -> IntervalMask:
    """Who is in whose document. Refuses counts that leave tokens out, which would train on less than was given."""
    if documents is None:
        return IntervalMask.full(length)
    counts, alike = document_rows(documents)
    if len(counts) not in (1, rows):
        raise ValueError(f"documents has lists for {len(counts)} rows, input_ids has {rows} rows")
    for row, lengths in enumerate(counts):
        if (total := sum(lengths)) != length:
            raise ValueError(
                f"sum(documents{'' if alike else f'[{row}]'})={total} must be the {length} tokens of a row of "
                f"input_ids; padding is a document of its own, its labels {_IGNORE}"
            )
    return IntervalMask.documents(counts, length)


def _agree(checksum: Tensor, shared: Sequence[ProcessRing | Ulysses]) -> None:
    """Refuse ranks that were given different sequences, as a sampler for data parallelism gives them.

    Each would take its shard of its own, and train on a sequence that nobody wrote. checksum: of what this rank was
    given; _REFUSED where that did not fit, of which only the others need to be told.
    """
    extremes = torch.stack([checksum, -checksum])
    for group in shared:
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group.group)
    greatest, least = extremes[0].item(), -extremes[1].item()
    if greatest == least or checksum == _REFUSED:
        return
    if least == _REFUSED:
        raise ValueError(
            "another rank of the ring refused its input_ids, labels, documents, first or layout: see its error"
        )
    raise ValueError(
        "input_ids, labels, documents, first and layout must be the same on every rank of a ring: each takes its shard "
        "of them"
    )


def _checksum(device: torch.device, *tensors: Tensor | None) -> Tensor:
    """An int64 scalar, 0 or more, that other numbers, other places or another shape would almost surely change."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for x in (x for x in tensors if x is not None):
        places = torch.arange(1, x.numel() + 1, device=x.device)
        mixed = (x.flatten().long() + 0x9E3779B9) * (places * 0x85EBCA6B + x.shape[-1])
        total += ((mixed ^ (mixed >> 29)).sum() & (2**58 - 1)).to(device)
    return total


# -- building


def build_model(config: ModelConfig) -> PreTrainedModel:
    """The model that a ModelConfig names, on the ring's attention, in fp32 or bf16, on the current device.

    Raises ConfigError naming the key where the model cannot be built or cannot train on the ring.
    """
    hf_config = read_config(config)
    options: dict[str, Any] = {"attn_implementation": "ring", "dtype": DTYPES[config.dtype]}
    if config.path is not None:
        return _pretrained(config.path, hf_config, options)
    try:
        _check_memory(hf_config, DTYPES[config.dtype])
        return AutoModelForCausalLM.from_config(hf_config, **options)
    except ConfigError:
        raise
    except Exception as error:  # of torch and transformers, of any kind
        raise ConfigError(f"model.architecture cannot be built: {words_of(error)}") from error


def _pretrained(path: str, hf_config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """The model of a folder. Raises ConfigError for weights that are missing, damaged or of other shapes."""
    try:
        loading: Any = AutoModelForCausalLM.from_pretrained(
            path, config=hf_config, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
            **options,
        )  # fmt: skip
    except Exception as error:  # transformers, safetensors and torch have no error in common
        raise ConfigError(f"model.path={path} has weights that cannot be loaded: {words_of(error)}") from error
    model, loaded = loading
    # transformers would put random weights in the place of those, and leave out the layers that are too many
    if missing := sorted(loaded["missing_keys"]):
        raise ConfigError(f"model.path={path} lacks {len(missing)} weights of its config.json, such as {missing[0]}")
    for name, found, expected in sorted(loaded["mismatched_keys"]):
        raise ConfigError(f"model.path={path} has {name} {[*found]}, and its config.json asks for {[*expected]}")
    if more := sorted(name for name in loaded["unexpected_keys"] if re.search(r"\.layers\.\d+\..*weight", name)):
        raise ConfigError(f"model.path={path} has {len(more)} weights that its config.json lacks, such as {more[0]}")
    return model


def _check_memory(hf_config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Raise ConfigError for a model whose weights alone are larger than the memory of this machine."""
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(hf_config).parameters())
    needed, memory = count * dtype.itemsize, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ConfigError(
            f"model.architecture has {count:,} parameters, {needed / 2**30:,.0f} GiB in {dtype}, and this machine has "
            f"{memory / 2**30:,.0f} GiB of memory: make it smaller (hidden_size, num_hidden_layers, vocab_size)"
        )


def refusal(config: PreTrainedConfig, router_logits: bool | None = None) -> str | None:
    """None, or what of a model would come out wrong on shards: "FIELD=VALUE is not supported ...".

    router_logits: whether the model is asked for them; None: as its configuration says.
    """
    if config.model_type not in ARCHITECTURES:
        return (
            f"model_type={config.model_type} is not one of {', '.join(ARCHITECTURES)}: other architectures are not "
            f"tested on the ring"
        )
    if getattr(config, "output_router_logits", False) if router_logits is None else router_logits:
        return "output_router_logits=True is not supported: the auxiliary loss of experts needs all tokens of a batch"
    if not getattr(config, "is_causal", True):
        return _BIDIRECTIONAL
    for rope in _rope_parameters(config):
        if (kind := rope.get("rope_type", "default")) not in _ROPE_TYPES:
            by_length = ": it depends on the longest position of a shard, not of the sequence"
            reason = by_length if kind in ("dynamic", "longrope") else ""
            return (
                f"rope_parameters.rope_type={kind} is not supported{reason}; default, linear, yarn and llama3 are "
                f"supported"
            )
    return None


def check_supported(config: PreTrainedConfig) -> None:
    """Raise ConfigError, naming the field and its value, for what would train wrongly on the ring."""
    if (reason := refusal(config)) is not None:
        raise ConfigError(f"model.architecture.{reason}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ConfigError(
            f"model.architecture.num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}"
        )
    dim, derived = head_dim(config), config.hidden_size // heads
    if dim < 2 or dim % 2:
        raise ConfigError(
            f"model.architecture.head_dim={dim}"
            + (f" (hidden_size={config.hidden_size} / num_attention_heads={heads})" if dim == derived else "")
            + " must be even and 2 or more: rotary positions turn pairs of a head's dimensions"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise ConfigError(
            f"model.architecture.attention_dropout={config.attention_dropout} is not supported; set it to 0"
        )


def check_length(config: ModelConfig, hf_config: PreTrainedConfig, length: int) -> None:
    """Raise ConfigError where sequences of `length` tokens have more positions than the model knows.

    Positions count within each document, but a document may fill its sequence.
    """
    known = known_positions(hf_config)
    if known is None or length <= known or config.extrapolate_positions:
        return
    kinds = ", ".join(rope.get("rope_type", "default") for rope in _rope_parameters(hf_config)) or "none"
    where = "model.architecture." if config.path is None else f"{config.path}/config.json: "
    raise ConfigError(
        f"data.sequence_length={length} is more than the {known} positions that the model knows "
        f"({where}max_position_embeddings={hf_config.max_position_embeddings}, rope_type={kinds}): raise "
        f"max_position_embeddings (with random weights), scale rope_parameters there (linear, yarn or llama3, factor x "
        f"original_max_position_embeddings), or allow it by model.extrapolate_positions=true"
    )


def known_positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model knows: those it was made for, or what its RoPE scales them to. None: any number."""
    known = getattr(config, "max_position_embeddings", None)
    if known is None:
        return None
    scaled = [
        int(rope["factor"] * (rope.get("original_max_position_embeddings") or known))
        for rope in _rope_parameters(config)
        if rope.get("rope_type", "default") != "default" and rope.get("factor")
    ]
    return max([known, *scaled])


def head_dim(config: PreTrainedConfig) -> int:
    """The size of a head, which some architectures leave to be derived."""
    given = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if given is None else given


def heads_of(config: PreTrainedConfig, ulysses: int = 1) -> Heads:
    """The heads that one of `ulysses` ranks computes attention for."""
    kv_heads = max(1, config.num_key_value_heads // ulysses)
    return Heads(config.num_attention_heads // ulysses, kv_heads, head_dim(config))


def windows_of_layers(config: PreTrainedConfig) -> list[tuple[int | None, int]]:
    """The sliding windows that layers have (None: they have none), and how many layers have each."""
    if config.model_type in ("mistral", "phi3"):  # one window for all layers, or none
        windowed = config.num_hidden_layers if config.sliding_window else 0
    else:
        windowed = (getattr(config, "layer_types", None) or []).count("sliding_attention")
    found = [(None, config.num_hidden_layers - windowed), (config.sliding_window if windowed else None, windowed)]
    return [(window, layers) for window, layers in found if layers]


def layer_masks(config: PreTrainedConfig, mask: IntervalMask) -> list[tuple[IntervalMask, int]]:
    """What layers see of a sequence with this mask, and how many layers see it."""
    return [
        (mask if window is None else mask & IntervalMask.window(mask.queries, window - 1), layers)
        for window, layers in windows_of_layers(config)
    ]


def check_kernel(config: ModelConfig, hf_config: PreTrainedConfig, device: torch.device) -> None:
    """Raise ConfigError with the reason where model.kernel cannot run this model's attention on `device`.

    The kernel is asked as a layer asks it, of one token: before there is a model.
    """
    q, k = (
        torch.empty(1, 1, heads, head_dim(hf_config), dtype=DTYPES[config.dtype], device=device)
        for heads in (hf_config.num_attention_heads, hf_config.num_key_value_heads)
    )
    softcap = getattr(hf_config, "attn_logit_softcapping", None) or None
    try:
        kernels.select(q, k, softcap, config.kernel, config.deterministic)
    except ValueError as error:
        raise ConfigError(str(error).replace("kernel=", "model.kernel=")) from error


def read_config(config: ModelConfig) -> PreTrainedConfig:
    """The transformers configuration that a ModelConfig names.

    Raises ConfigError naming the key where it cannot be read or cannot train on the ring.
    """
    hf_config = _configuration(config)
    check_supported(hf_config)
    return hf_config


def _configuration(config: ModelConfig) -> PreTrainedConfig:
    if config.path is not None:
        return _configuration_of(config.path)
    settings = dict(config.architecture)
    model_type = settings.pop("model_type", None)
    if model_type not in ARCHITECTURES:
        raise ConfigError(f"model.architecture.model_type={model_type} is not one of {', '.join(ARCHITECTURES)}")
    for name in settings:
        if (reason := field_refusal(model_type, name)) is not None:
            raise ConfigError(reason)
    if (reason := value_refusal(settings)) is not None:
        raise ConfigError(f"model.architecture.{reason}")
    try:
        hf_config = AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # transformers raises its own validation types
        raise ConfigError(refused("model.architecture.", error, settings)) from error
    tokens = settings | {"pad_token_id": hf_config.pad_token_id}  # which has a row of the embedding, set or not
    if (reason := token_refusal(tokens, hf_config.vocab_size)) is not None:
        raise ConfigError(f"model.architecture.{reason}")
    return hf_config


def _configuration_of(path: str) -> PreTrainedConfig:
    """The configuration of a model's folder. Raises ConfigError where it is missing, damaged or of no model."""
    file = Path(path) / "config.json"
    if not os.path.isfile(file):  # pathlib raises for a name that is too long
        raise ConfigError(f"model.path={path} holds no config.json: it must be a Hugging Face model folder")
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path}: config.json cannot be read: {words_of(error)}") from error
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if model_type not in ARCHITECTURES:
        raise ConfigError(f"model.path={path}: model_type={model_type} is not one of {', '.join(ARCHITECTURES)}")
    if (reason := value_refusal(settings)) is not None:
        raise ConfigError(f"model.path={path}: in config.json {reason}")
    try:
        hf_config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises its own validation types
        raise ConfigError(refused(f"model.path={path}: in config.json ", error, settings)) from error
    if (reason := token_refusal({"pad_token_id": hf_config.pad_token_id}, hf_config.vocab_size)) is not None:
        raise ConfigError(f"model.path={path}: in config.json {reason}")
    return hf_config


def field_refusal(model_type: str, name: str) -> str | None:
    """None, or why model.architecture.NAME cannot be set, with the nearest field that can."""
    known = AutoConfig.for_model(model_type)
    if hasattr(known, name):
        return None
    # What all of transformers' configurations have is bookkeeping, and nothing that a typing error was meant for.
    own = {f.name for f in fields(known)} - {f.name for f in fields(PreTrainedConfig)}
    close = difflib.get_close_matches(name, sorted(own), n=1)
    return f"model.architecture.{name} is not a field of a {model_type} configuration" + (
        f"; did you mean model.architecture.{close[0]}?" if close else ""
    )


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The model's RoPE settings; some models keep one set for each kind of layer."""
    with contextlib.suppress(AttributeError):
        settings = config.rope_parameters or {}
        nested = [value for value in settings.values() if isinstance(value, dict)]
        return nested or [settings]
    return []
