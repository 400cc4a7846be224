"""The arguments of attention in each layer of a model, from its configuration: heads, their sizes, windows.

Layers of one model may differ. Gemma 4's full layers have larger and fewer KV heads than those with a window, and
MiMo-V2-Flash's have half as many KV heads. Layouts, FLOPs, memory and caches are counted kind by kind. Layers of linear
attention have heads with states, beside attention or without it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from transformers import PreTrainedConfig

from ringflash.mask import IntervalMask
from ringflash.models.families import Recurrence, Windows, has_chunks, recurrence_of, windows_of
from ringflash.models.mixer import divides
from ringflash.ring.cost import Heads, Layers
from ringflash.ring.plan import AttentionPlan

# What layer_types names the layers with linear attention, and those with attention.
_STATES, _ATTENTIONS = ("linear_attention", "hybrid"), ("full_attention", "hybrid")


@dataclass(frozen=True)
class LayerKind:
    """Attention of layers of one kind. window: how many tokens a query sees, or None for all before it.

    chunk: tokens of a document that see no others; None: not limited by chunks.
    """

    window: int | None
    heads: Heads
    chunk: int | None = None

    def mask(self, mask: IntervalMask) -> IntervalMask:
        """The mask of these layers, for sequences with this mask."""
        mask = mask if self.window is None else mask & IntervalMask.window(mask.queries, self.window - 1)
        return mask if self.chunk is None else mask.in_chunks(self.chunk)

    def plan(self, plan: AttentionPlan) -> AttentionPlan:
        """The plan of these layers, in a step with this plan."""
        plan = plan if self.window is None else plan.window(self.window - 1)
        return plan if self.chunk is None else plan.in_chunks(self.chunk)


@dataclass(frozen=True)
class StateHeads:
    """Heads of linear attention: their numbers, and their sizes, which are also those of a value head's state.

    operations: those of a token's forward per element of a state.
    """

    key: int
    value: int
    dim: int
    value_dim: int
    operations: int

    @property
    def convolved(self) -> int:
        """Elements of one token's queries, keys and values."""
        return 2 * self.key * self.dim + self.value * self.value_dim


def state_heads(config: PreTrainedConfig) -> StateHeads | None:
    """The heads of a model's linear attention; None for a model without any."""
    if (recurrence := recurrence_of(config.model_type)) is None or not state_layers(config):
        return None
    key, value, dim, value_dim = (getattr(config, name) for name in recurrence[:4])
    return StateHeads(key, value, dim, value_dim, recurrence.operations)


def state_layers(config: PreTrainedConfig, first: int | None = None) -> int:
    """The number of layers with linear attention, among all of a model's or its first ones."""
    if recurrence_of(config.model_type) is None:
        return 0
    return sum(kind in _STATES for kind in config.layer_types[:first])


def state_refusal(config: PreTrainedConfig, ranks: int) -> str | None:
    """None, or why the `ranks` ranks of a sequence cannot share a model's heads of linear attention."""
    heads, recurrence = state_heads(config), recurrence_of(config.model_type)
    if heads is None or recurrence is None:
        return None
    return sharing_refusal(recurrence, heads.key, heads.value, ranks)


def sharing_refusal(recurrence: Recurrence, key: int, value: int, ranks: int) -> str | None:
    """None, or why the `ranks` ranks of a sequence cannot share these key heads and value heads."""
    if divides(key, value, ranks):
        return None
    most = max(n for n in range(1, ranks) if ranks % n == 0 and divides(key, value, n))
    return (
        f"{recurrence.value_heads}={value} with {recurrence.key_heads}={key} does not divide among the {ranks} ranks "
        f"of a sequence (ring x ulysses), which exchange tokens for heads: give each sequence {most}, as by "
        f"parallel.ring={most} parallel.ulysses=1"
    )


def kinds_of_layers(config: PreTrainedConfig) -> list[LayerKind | None]:
    """The kind of each layer, in order; None for layers without attention."""
    return [_kind(config, layer) if attends else None for layer, attends in enumerate(_attends(config))]


def first_attention(config: PreTrainedConfig) -> int:
    """The first layer with attention, which a model must have."""
    return _attends(config).index(True)


def layer_kinds(config: PreTrainedConfig, first: int | None = None) -> dict[LayerKind, int]:
    """The kinds of layers with attention, among all or the first ones; how often a forward calls attention in each."""
    counts = Counter(kind for kind in kinds_of_layers(config)[:first] if kind is not None)
    return {kind: layers * calls_per_layer(config) for kind, layers in counts.items()}


def layer_masks(config: PreTrainedConfig, mask: IntervalMask) -> list[Layers]:
    """For each kind of layer: its mask for sequences with this mask, its heads, and the number of such layers."""
    return [Layers(kind.mask(mask), kind.heads, count) for kind, count in layer_kinds(config).items()]


def calls_per_layer(config: PreTrainedConfig) -> int:
    """The number of times that a layer calls attention, each time with all of its heads."""
    return 2 if config.model_type == "diffllama" else 1


def input_widths(config: PreTrainedConfig) -> list[int]:
    """How many numbers per token each input of a layer has, which a checkpointed layer keeps.

    Gemma 3n has several hidden states. Its layers and Gemma 4's also take a second, smaller input.
    """
    own = getattr(config, "hidden_size_per_layer_input", None)
    return [config.hidden_size * getattr(config, "altup_num_inputs", 1), *([own] if own else [])]


def _attends(config: PreTrainedConfig) -> list[bool]:
    """Whether each layer has attention."""
    if recurrence_of(config.model_type) is None:
        return [True] * config.num_hidden_layers
    return [kind in _ATTENTIONS for kind in config.layer_types]


def chunk_size(config: PreTrainedConfig, layer: int) -> int | None:
    """The chunk size in tokens that a layer is limited to, or None."""
    if has_chunks(config.model_type) and config.layer_types[layer] == "chunked_attention":
        return config.attention_chunk_size
    return None


def _kind(config: PreTrainedConfig, layer: int) -> LayerKind:
    own = config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config
    kinds = getattr(config, "layer_types", None)
    which = windows_of(config.model_type, kinds is not None)
    windowed = which is Windows.ALL or (which is Windows.SOME and kinds and kinds[layer] == "sliding_attention")
    window = getattr(own, "sliding_window", None) if windowed else None
    return LayerKind(window or None, _heads(own, bool(windowed)), chunk_size(config, layer))


def _heads(config: PreTrainedConfig, windowed: bool) -> Heads:
    """The heads of a layer with this configuration; some architectures leave numbers and sizes to be derived."""
    query = config.num_attention_heads
    if hasattr(config, "qk_nope_head_dim"):  # MLA
        return Heads(query, query, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    kv_heads, dim = (getattr(config, name, None) for name in ("num_key_value_heads", "head_dim"))
    key = query if kv_heads is None else kv_heads
    if config.model_type == "mimo_v2_flash" and windowed:
        key *= 2
    size = config.hidden_size // query if dim is None else dim
    return Heads(query, key, size, getattr(config, "v_head_dim", None) or size)
