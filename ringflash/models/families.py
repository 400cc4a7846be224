"""Families: the architectures whose training on the ring is proven, and why others that people know are refused.

`python -m tests.models.sweep` proves each of FAMILIES against its own eager attention and writes docs/models.md.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ringflash.errors import did_you_mean


class Windows(Enum):
    """Which layers of a family have a sliding window, where its configuration sets one."""

    NONE = "none"
    SOME = "those that layer_types names sliding_attention"
    ALL = "all, where sliding_window is set"


class Recurrence(NamedTuple):
    """Layers of linear attention: the fields of a configuration that describe them, and their classes.

    Each value head has a state [dim, value_dim], and as many value heads share each key head.
    """

    key_heads: str
    value_heads: str
    dim: str
    value_dim: str
    classes: tuple[str, ...]  # what the names of transformers' classes end with
    operations: int  # of a token's forward, per element of a state
    activation: str | None = "hidden_act"  # that of the convolutions; None: always SiLU
    layers: tuple[str, ...] = ("linear_attention", "full_attention")  # what layer_types may name


class Family(NamedTuple):
    """What a family asks of attention, apart from causal masks and grouped heads."""

    windows: Windows = Windows.NONE
    needs: str = ""  # further needs, for docs/models.md
    chunks: bool = False  # whether the layers that layer_types names chunked_attention are limited to chunks
    recurrence: Recurrence | None = None  # of the layers that layer_types names linear_attention or hybrid


_EXPERTS, _LATENT = "experts", "latent heads (MLA): keys larger than values"
_DELTA, _MAMBA = "gated DeltaNet layers", "Mamba-2 layers"
_SOME, _ALL = Windows.SOME, Windows.ALL
# With the delta rule, keys and queries read a state, and an update writes it. In a scan no key reads it.
_DELTA_RULE = Recurrence(
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    ("GatedDeltaNet",), operations=6,
)  # fmt: skip
_SCAN = Recurrence(
    "mamba_n_groups", "mamba_n_heads", "mamba_d_state", "mamba_d_head", ("Mixer", "MambaLayer"), operations=4,
)  # fmt: skip
_NEMOTRON_SCAN = _SCAN._replace(
    key_heads="n_groups", value_heads="mamba_num_heads", dim="ssm_state_size", value_dim="mamba_head_dim",
    activation="mamba_hidden_act", layers=(*_SCAN.layers, "moe", "mlp"),
)  # fmt: skip

FAMILIES = {
    "afmoe": Family(_SOME, _EXPERTS),
    "apertus": Family(),
    "arcee": Family(),
    "axk1": Family(needs=f"{_EXPERTS}, {_LATENT}"),
    "bamba": Family(needs=_MAMBA, recurrence=_SCAN),
    "bitnet": Family(),
    "cohere": Family(needs="logit_scale"),
    "cohere2": Family(_SOME, "logit_scale"),
    "cohere2_moe": Family(_SOME, f"{_EXPERTS}, logit_scale"),
    "cwm": Family(_SOME),
    "deepseek_v2": Family(needs=f"{_EXPERTS}, {_LATENT}"),
    "deepseek_v3": Family(needs=f"{_EXPERTS}, {_LATENT}"),
    "diffllama": Family(needs="attention twice per layer"),
    "dots1": Family(_SOME, _EXPERTS),
    "ernie4_5": Family(),
    "ernie4_5_moe": Family(needs=_EXPERTS),
    "exaone4": Family(_SOME),
    "exaone_moe": Family(_SOME, _EXPERTS),
    "falcon_h1": Family(needs=f"{_MAMBA} beside attention, multipliers", recurrence=_SCAN._replace(layers=("hybrid",))),
    "flex_olmo": Family(needs=_EXPERTS),
    "gemma": Family(),
    "gemma2": Family(_SOME, "softcaps of scores and logits"),
    "gemma3_text": Family(_SOME, "softcap of logits"),
    "gemma3n_text": Family(_SOME, "keys shared by layers, softcap of logits"),
    "gemma4_text": Family(_SOME, "heads by layer, keys shared by layers, experts, softcap of logits"),
    "glm": Family(),
    "glm4": Family(),
    "glm4_moe": Family(needs=_EXPERTS),
    "glm4_moe_lite": Family(needs=f"{_EXPERTS}, {_LATENT}"),
    "gpt_neox": Family(),
    "gpt_oss": Family(_SOME, f"{_EXPERTS}, sinks"),
    "granite": Family(needs="logits_scaling"),
    "granite_swa": Family(_SOME, "sinks, logits_scaling"),
    "granitemoe": Family(needs=f"{_EXPERTS}, logits_scaling"),
    "granitemoe_swa": Family(_SOME, f"{_EXPERTS}, sinks, logits_scaling"),
    "granitemoehybrid": Family(
        needs=f"{_MAMBA}, layers without positions, {_EXPERTS}, logits_scaling", recurrence=_SCAN
    ),
    "granitemoeshared": Family(needs=f"{_EXPERTS}, logits_scaling"),
    "helium": Family(),
    "hunyuan_v1_dense": Family(needs="dynamic RoPE with alpha"),
    "hunyuan_v1_moe": Family(needs=_EXPERTS),
    "hy_v3": Family(needs=_EXPERTS),
    "hyperclovax": Family(needs="logits_scaling"),
    "jais2": Family(),
    "laguna": Family(_SOME, _EXPERTS),
    "llama": Family(needs="dynamic RoPE"),
    "llama4_text": Family(needs=f"chunks, queries scaled by position, {_EXPERTS}", chunks=True),
    "mellum": Family(_SOME, _EXPERTS),
    "mimo_v2_flash": Family(_SOME, f"heads by layer, values smaller than keys, {_EXPERTS}, sinks"),
    "minicpm3": Family(needs=_LATENT),
    "minimax_m2": Family(needs=_EXPERTS),
    "ministral": Family(_SOME),
    "ministral3": Family(_ALL),
    "mistral": Family(_ALL),
    "mixtral": Family(_ALL, _EXPERTS),
    "nanochat": Family(needs="softcap of logits"),
    "nemotron_h": Family(
        needs=f"{_MAMBA}, no positions, layers of experts or of an MLP alone", recurrence=_NEMOTRON_SCAN
    ),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(_SOME),
    "olmo_hybrid": Family(needs=f"{_DELTA}, layers without positions", recurrence=_DELTA_RULE),
    "olmoe": Family(needs=_EXPERTS),
    "persimmon": Family(),
    "phi": Family(needs="bias of logits"),
    "phi3": Family(_ALL, "longrope"),
    "phimoe": Family(_ALL, f"{_EXPERTS}, longrope, bias of logits"),
    "qwen2": Family(_SOME),
    "qwen2_moe": Family(_SOME, _EXPERTS),
    "qwen3": Family(_SOME),
    "qwen3_5_moe_text": Family(needs=f"{_DELTA}, {_EXPERTS}", recurrence=_DELTA_RULE),
    "qwen3_5_text": Family(needs=_DELTA, recurrence=_DELTA_RULE),
    "qwen3_moe": Family(_ALL, _EXPERTS),
    "qwen3_next": Family(needs=f"{_DELTA}, {_EXPERTS}", recurrence=_DELTA_RULE),
    "seed_oss": Family(),
    "smollm3": Family(_SOME, "layers without positions"),
    "solar_open": Family(needs=_EXPERTS),
    "starcoder2": Family(_ALL),
    "vaultgemma": Family(_SOME, "softcaps of scores and logits"),
    "youtu": Family(needs=_LATENT),
}
ARCHITECTURES = tuple(FAMILIES)

# Models of images and text, and the family of their text models, which model.path takes of their folders
TEXT_MODELS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
# Their weights' names there, as patterns, and in a model of text
TEXT_NAMES = {
    r"^(?:model\.language_model|language_model\.model)\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}

_RECURRENT = "layers of linear attention, recurrence or convolution carry state over the tokens of a shard"
_SHARED = "its layers share one attention, which is not given the number of the layer"
_IMAGES = "a model of images and text, and only models of text are on the ring"
_NO_PLAN = "transformers passes no keywords, and so no plan, to its attention"
_OWN_MASK = "its attention makes a mask of its own"
_SPARSE = "its attention selects keys by score, which no interval of keys describes"
REFUSED = {
    **dict.fromkeys(
        ("falcon_mamba", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba",
         "mamba2", "minimax", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zaya"),
        _RECURRENT,
    ),
    "zamba2": _SHARED,
    **dict.fromkeys(("deepseek_v32", "deepseek_v4", "glm_moe_dsa"), _SPARSE),
    **dict.fromkeys(("gemma3n", "mllama"), _IMAGES),
    **dict.fromkeys(TEXT_MODELS, f"{_IMAGES}; of its folders, model.path takes the text model"),
    **dict.fromkeys(("nemotron", "stablelm"), _NO_PLAN),
    **dict.fromkeys(("bloom", "doge", "falcon", "gpt2", "hy_v4", "mpt"), _OWN_MASK),
}  # fmt: skip

_allowed: set[str] = set()


def allow_untested(model_type: str) -> None:
    """Allow a family that docs/models.md does not list, in this process.

    The caller asserts that

    - its layers mix tokens only in attention, which is called through transformers' AttentionInterface and limited
      only by windows;
    - positions enter only through position_ids, and nothing else depends on the number of tokens;
    - in the trainer: its logits are those of lm_head, times logit_scale, capped at final_logit_softcapping.

    Raises ValueError for a family that is refused for a reason, and for a model_type that transformers does not have.
    """
    if (reason := _final_refusal(model_type)) is not None:
        raise ValueError(reason)
    _allowed.add(model_type)


def family_refusal(model_type: object) -> str | None:
    """None, or why a model of this model_type is refused: "model_type=... ..."."""
    if model_type in FAMILIES or model_type in _allowed:
        return None
    if (reason := _final_refusal(model_type)) is not None:
        return reason
    return (
        f"model_type={model_type} is not one of the {len(FAMILIES)} families that docs/models.md lists as tested on "
        f"the ring; model.untested_family=true, or ringflash.models.allow_untested({model_type!r}), allows it"
    )


def _final_refusal(model_type: object) -> str | None:
    """None, or why not even allow_untested accepts a model_type."""
    if model_type in REFUSED:
        return f"model_type={model_type} is not supported on the ring: {REFUSED[str(model_type)]}"
    if model_type in CONFIG_MAPPING_NAMES:
        return None
    meant = did_you_mean(str(model_type), CONFIG_MAPPING_NAMES)
    return f"model_type={model_type} is not one of transformers' configurations{meant}"


def has_chunks(model_type: str) -> bool:
    """Whether a family has layers of chunked attention; others with such layers are refused by their masks."""
    return model_type in FAMILIES and FAMILIES[model_type].chunks


def recurrence_of(model_type: str) -> Recurrence | None:
    """The linear attention of a family; None for a family without any."""
    return FAMILIES[model_type].recurrence if model_type in FAMILIES else None


def windows_of(model_type: str, by_layer: bool) -> Windows:
    """Which layers have a window. by_layer: for other families, whether the configuration has layer_types."""
    family = FAMILIES.get(model_type)
    return family.windows if family is not None else (Windows.SOME if by_layer else Windows.ALL)
