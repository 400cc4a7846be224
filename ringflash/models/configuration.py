"""The model to train: its settings, its transformers configuration, and the reasons why the ring cannot train it.

What depends only on a configuration is also read here: experts, the scale of logits, positions.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from ringflash import kernels
from ringflash.errors import ConfigError, check_choice, did_you_mean, hub_hint, in_one_line
from ringflash.kernels import FASTEST_FIRST
from ringflash.models.architecture import refused, token_refusal, value_refusal
from ringflash.models.families import TEXT_MODELS, Recurrence, allow_untested, family_refusal, has_chunks, recurrence_of
from ringflash.models.float8 import LINEAR_DTYPES
from ringflash.models.layers import layer_kinds
from ringflash.models.linear_kernels import device_refusal
from ringflash.models.lora import ROPE, LoraConfig, is_adapter, read_fields
from ringflash.models.rope import LENGTH_DEPENDENT, extended, rope_kinds, rope_refusal, supported_positions
from ringflash.models.rope_length import length_refusal

DTYPES = {
    "auto": torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}

BIDIRECTIONAL = (
    "is_causal=False is not supported on the ring: ring_inputs makes causal plans, and tokens would not see those "
    "after them; load a causal model, or train this one without a ring"
)
# What transformers' configurations call the number of experts, and the number that a token is routed to.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("moe_topk", "num_experts_per_tok", "moe_k", "top_k_experts")
# Fields that layers, or the configuration's own making, read, although its class has none.
_UNDECLARED = {"qwen3_moe": ("head_dim",), "gemma4_text": ("global_head_dim", "num_global_key_value_heads")}


@dataclass(frozen=True)
class ModelConfig:
    """The model to train, given by either `path` or `architecture`."""

    path: str | None = None
    """Folder of a Hugging Face model to start from; null: random weights."""

    architecture: dict[str, Any] = field(default_factory=dict)
    """A transformers configuration: a model_type of docs/models.md, and fields of its configuration."""

    rope_parameters: dict[str, Any] = field(default_factory=dict)
    """RoPE parameters to replace in the model of `path`, such as {rope_type: yarn, factor: 4.0} to extend its context;
    one dictionary per kind of layer if the model has several. The exported model includes them."""

    rope_length: int | None = None
    """With longrope and dynamic RoPE, the document length, in tokens, whose frequencies all documents get; null: each
    document gets those of its own length."""

    dtype: str = "auto"
    """dtype of weights and activations: bf16 (with fp32 master weights), fp32, or auto: bf16 on a GPU, else fp32."""

    linear_dtype: str | None = None
    """fp8: products of linear layers in attention and MLPs are in 8 bits, on a Hopper GPU, and weights stay bf16; null:
    in the model's dtype."""

    extrapolate_positions: bool = False
    """Allow sequences longer than the model supports (max_position_embeddings, or the length that RoPE scales to). With
    default, linear or llama3 RoPE, the exported model allows their length, too."""

    untested_family: bool = False
    """Allow a model_type that docs/models.md does not list. You assert that its tokens interact only in attention,
    restricted by nothing but windows; that positions enter only through position_ids; and that its logits are those of
    lm_head, times logit_scale, capped at final_logit_softcapping."""

    freeze: list[str] = field(default_factory=list)
    """Parameters that are not trained: globs of their names or of modules above them, as in .gitignore. The last one
    that matches decides; "!" before it trains again: ["*","!model.layers.3?"] trains layers 30 to 39."""

    neftune_alpha: float = 0.0
    """NEFTune: in training, embeddings get uniform noise of at most alpha / sqrt(document length x hidden size). The
    paper uses 5 to 15; 0: none."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters that are trained instead of the model's weights."""

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
        if self.rope_parameters and self.architecture:
            raise ConfigError(
                f"model.rope_parameters={self.rope_parameters} changes a model of model.path: with random weights set "
                f"model.architecture.rope_parameters"
            )
        if self.lora.enabled and not self.path:
            raise ConfigError(
                "model.lora adapts a model of model.path: random weights would be frozen, and never learn anything"
            )
        self._check_freeze()
        if not 0 <= self.neftune_alpha < math.inf:
            raise ConfigError(f"model.neftune_alpha={self.neftune_alpha} must be 0 or more and finite")
        if self.rope_length is not None and self.rope_length < 1:
            raise ConfigError(f"model.rope_length={self.rope_length} must be 1 or more, or null")
        check_choice("model.dtype", self.dtype, DTYPES)
        self._check_linear_dtype()

    def _check_linear_dtype(self) -> None:
        if self.linear_dtype is None:
            return
        setting = f"model.linear_dtype={self.linear_dtype}"
        if self.linear_dtype not in LINEAR_DTYPES:
            raise ConfigError(f"{setting} is not one of null, {', '.join(LINEAR_DTYPES)}")
        if self.dtype == "fp32":
            raise ConfigError(f"{setting} needs model.dtype=bf16: with model.dtype=fp32, set model.linear_dtype=null")
        if self.lora.enabled:
            raise ConfigError(
                f"{setting} trains all weights: with model.lora, whose adapters are products in 16 bits, set "
                f"model.linear_dtype=null"
            )

    def _check_freeze(self) -> None:
        """Raise ConfigError for frozen weights that could never have learned, and beside adapters."""
        if self.freeze and not self.path:
            raise ConfigError(
                f"model.freeze={self.freeze} freezes weights of model.path: random weights would never learn anything"
            )
        if self.freeze and self.lora.enabled:
            raise ConfigError(
                f"model.freeze={self.freeze} has no effect with model.lora, which freezes all weights of the model: "
                f"model.lora.targets names the layers that get an adapter"
            )


@dataclass(frozen=True)
class AttentionConfig:
    """How every layer computes attention."""

    kernel: str = "auto"
    """Attention kernel: auto (the fastest one that supports the model), hopper (Gluon), portable (Triton) or blocked
    (plain torch)."""

    deterministic: bool = False
    """Make gradients bit-equal from run to run, and after a resume. This is slower with the hopper kernel; the others
    are always deterministic. Models with linear attention refuse it on GPUs."""

    compensated: bool = True
    """Compensate in the gradients for the rounding of attention's 16-bit output, at a small cost in speed and
    memory."""

    def __post_init__(self) -> None:
        check_choice("attention.kernel", self.kernel, ("auto", *FASTEST_FIRST))


def read_config(config: ModelConfig) -> PreTrainedConfig:
    """The transformers configuration that a ModelConfig names.

    Raises ConfigError naming the key if it cannot be read or cannot train on the ring.
    """
    hf_config = _configuration(config)
    check_supported(hf_config)
    if config.lora.quantize_base is not None and experts_of(hf_config)[0] > 1:
        raise ConfigError(
            f"model.lora.quantize_base={config.lora.quantize_base}: the experts of model_type={hf_config.model_type} "
            f"are no linear layers, and would not be quantized"
        )
    return hf_config


def _configuration(config: ModelConfig) -> PreTrainedConfig:
    if config.path is not None:
        return _configuration_of(config, config.path)
    settings = dict(config.architecture)
    model_type = settings.pop("model_type", None)
    _check_family(model_type, config, "model.architecture.")
    for name in settings:
        if (reason := field_refusal(model_type, name)) is not None:
            raise ConfigError(reason)
    if (reason := value_refusal({"model_type": model_type, **settings})) is not None:
        raise ConfigError(f"model.architecture.{reason}")
    try:
        hf_config = AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # transformers raises its own validation types
        raise ConfigError(refused("model.architecture.", error, settings)) from error
    if (layers := settings.get("num_hidden_layers", hf_config.num_hidden_layers)) != hf_config.num_hidden_layers:
        raise ConfigError(
            f"model.architecture.num_hidden_layers={layers} is not the {hf_config.num_hidden_layers} layers that "
            f"layer_types={hf_config.layer_types} has"
        )
    special = settings | {"pad_token_id": hf_config.pad_token_id}  # which has a row of the embedding, set or not
    if (reason := token_refusal(special, hf_config.vocab_size)) is not None:
        raise ConfigError(f"model.architecture.{reason}")
    return hf_config


def _check_family(model_type: Any, config: ModelConfig, where: str) -> None:
    """Raise ConfigError for a family that is refused. An untested one is allowed from here on if the user says so."""
    if family_refusal(model_type) is not None and config.untested_family:
        try:
            allow_untested(model_type)
        except ValueError as error:
            raise ConfigError(f"{where}{error}") from error
    if (reason := family_refusal(model_type)) is not None:
        raise ConfigError(f"{where}{reason}")


def _configuration_of(config: ModelConfig, path: str) -> PreTrainedConfig:
    """The configuration of a model's folder. Raises ConfigError if it is missing, damaged or of no model."""
    file = Path(path) / "config.json"
    if is_adapter(path):  # which transformers would load, too, and leave unmerged
        raise ConfigError(
            f"model.path={path} holds an adapter of peft: merge it into its model (merge_and_unload, save_pretrained), "
            f"or train it further by model.lora.path"
        )
    if not os.path.isfile(file):  # pathlib raises for a name that is too long
        raise ConfigError(
            f"model.path={path} holds no config.json: it must be a Hugging Face model folder{hub_hint(path)}"
        )
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path}: config.json cannot be read: {in_one_line(error)}") from error
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    _check_family(TEXT_MODELS.get(str(model_type), model_type), config, f"model.path={path}: ")
    if (reason := value_refusal(settings)) is not None:
        raise ConfigError(f"model.path={path}: in config.json {reason}")
    try:
        hf_config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises its own validation types
        raise ConfigError(refused(f"model.path={path}: in config.json ", error, settings)) from error
    if model_type in TEXT_MODELS:
        hf_config = _text_part(hf_config, settings)
    if (reason := token_refusal({"pad_token_id": hf_config.pad_token_id}, hf_config.vocab_size)) is not None:
        raise ConfigError(f"model.path={path}: in config.json {reason}")
    if config.lora.path is not None and (rope := read_fields(config.lora.path).get(ROPE, {})) != config.rope_parameters:
        raise ConfigError(
            f"model.lora.path={config.lora.path} was trained with model.rope_parameters={rope}, and this run has "
            f"model.rope_parameters={config.rope_parameters}: set them alike"
        )
    return _with_rope(config, hf_config) if config.rope_parameters else hf_config


def _text_part(whole: PreTrainedConfig, settings: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of the text model in one of images and text; where it does not say, what the whole says."""
    text, said = whole.get_text_config(), settings.get("text_config", {})
    if "tie_word_embeddings" not in said:
        text.tie_word_embeddings = whole.tie_word_embeddings
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name not in said and settings.get(name) is not None:
            setattr(text, name, settings[name])
    return text


def _with_rope(config: ModelConfig, hf_config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with model.rope_parameters. Raises ConfigError for what it cannot have."""
    try:
        found = extended(hf_config, config.rope_parameters)
    except ValueError as error:
        raise ConfigError(f"model.rope_parameters{error}") from error
    except Exception as error:  # transformers raises its own validation types
        settings = {"rope_parameters": config.rope_parameters}
        raise ConfigError(refused("model.rope_parameters: ", error, settings)) from error
    if (reason := value_refusal({"rope_parameters": found.rope_parameters})) is not None:
        raise ConfigError(f"model.{reason}")
    return found


def field_refusal(model_type: str, name: str) -> str | None:
    """None, or why model.architecture.NAME cannot be set, with the nearest field that can."""
    known = AutoConfig.for_model(model_type)
    by_layer = getattr(known, "per_layer_attributes", None) or ()  # which such a configuration refuses to be asked for
    if name in (*by_layer, *_UNDECLARED.get(model_type, ())) or hasattr(known, name):
        return None
    # What all of transformers' configurations have is bookkeeping, and nothing that a typing error was meant for.
    own = {f.name for f in fields(known)} - {f.name for f in fields(PreTrainedConfig)}
    meant = did_you_mean(name, sorted(own), "model.architecture.{}")
    return f"model.architecture.{name} is not a field of a {model_type} configuration{meant}"


def check_supported(config: PreTrainedConfig) -> None:
    """Raise ConfigError, naming the field and its value, for what would train wrongly on the ring."""
    if (reason := refusal(config)) is not None:
        raise ConfigError(f"model.architecture.{reason}")
    kinds = layer_kinds(config)
    for kind in kinds:
        heads = kind.heads
        which = f" of layers with sliding_window={kind.window}" if len(kinds) > 1 else ""
        if heads.query % heads.key:
            raise ConfigError(
                f"model.architecture.num_attention_heads={heads.query} is not divisible by "
                f"num_key_value_heads={heads.key}{which}"
            )
        if heads.dim < 2 or heads.dim % 2:
            derived = f" (hidden_size={config.hidden_size} / num_attention_heads={heads.query})"
            raise ConfigError(
                f"model.architecture.head_dim={heads.dim}{which}"
                + (derived if heads.dim == config.hidden_size // heads.query else "")
                + " must be even and 2 or more: rotary positions turn pairs of a head's dimensions"
            )
    if getattr(config, "attention_dropout", 0.0):
        raise ConfigError(
            f"model.architecture.attention_dropout={config.attention_dropout} is not supported; set it to 0"
        )


def refusal(config: PreTrainedConfig) -> str | None:
    """None, or what of a model would come out wrong on shards: "FIELD=VALUE is not supported ..."."""
    if (reason := family_refusal(config.model_type)) is not None:
        return reason
    if not getattr(config, "is_causal", True):
        return BIDIRECTIONAL
    if (seen := getattr(config, "use_bidirectional_attention", None)) in (True, "all"):
        return BIDIRECTIONAL.replace("is_causal=False", f"use_bidirectional_attention={seen}")
    if has_chunks(config.model_type) and not config.attention_chunk_size:
        return f"attention_chunk_size={config.attention_chunk_size} is not supported: it must be 1 or more tokens"
    recurrence = recurrence_of(config.model_type)
    return (None if recurrence is None else _recurrence_refusal(config, recurrence)) or rope_refusal(config)


def _recurrence_refusal(config: Any, names: Recurrence) -> str | None:
    """None, or what of a model with linear attention is not supported."""
    kinds = config.layer_types
    if set(kinds) - {*names.layers} or not {"full_attention", "hybrid"} & {*kinds}:
        return (
            f"layer_types={kinds} is not supported: all must be one of {', '.join(names.layers)}, and one must have "
            f"attention"
        )
    if names.activation is not None and (activation := getattr(config, names.activation)) != "silu":
        return f"{names.activation}={activation} is not supported: the convolutions of linear attention have silu alone"
    key, value = getattr(config, names.key_heads), getattr(config, names.value_heads)
    if value % key:
        return f"{names.value_heads}={value} is not divisible by {names.key_heads}={key}"
    if weight := getattr(config, "z_loss_coefficient", 0.0):
        return f"z_loss_coefficient={weight} is not supported: that loss would be a mean over a shard; set it to 0"
    if (by_length := rope_kinds(config)) in LENGTH_DEPENDENT:
        return f"rope_parameters.rope_type={by_length} is not supported in a model with linear attention"
    return None


def check_length(config: ModelConfig, hf_config: PreTrainedConfig, length: int) -> None:
    """Raise ConfigError if sequences of `length` tokens have more positions than the model supports.

    Positions count within each document, but a document may fill its sequence.
    """
    if config.rope_length is None and (reason := length_refusal(hf_config, length, per_document=True)) is not None:
        raise ConfigError(f"data.sequence_length={length}: {reason}")
    known = supported_positions(hf_config)
    if known is None or length <= known or config.extrapolate_positions:
        return
    where = "model.architecture." if config.path is None else f"{config.path}/config.json: "
    if config.path is None:
        remedy = "raise max_position_embeddings, scale rope_parameters there (linear, dynamic, yarn or llama3)"
    else:
        factor = math.ceil(length / hf_config.max_position_embeddings)
        remedy = f"scale them, as by model.rope_parameters={{rope_type: yarn, factor: {factor}}}"
    raise ConfigError(
        f"data.sequence_length={length} is more than the {known} positions that the model supports "
        f"({where}max_position_embeddings={hf_config.max_position_embeddings}, rope_type={rope_kinds(hf_config)}): "
        f"{remedy}, or allow it by model.extrapolate_positions=true"
    )


def attention_kernels(
    config: ModelConfig, attention: AttentionConfig, hf_config: PreTrainedConfig, device: torch.device
) -> list[str]:
    """The kernels that attention.kernel gives this model's layers on `device`, by name, each once.

    They are chosen as a layer chooses, of one token: before there is a model. Raises ConfigError with the reason where
    attention.kernel cannot run this model's attention, or nothing its linear attention.
    """
    softcap = getattr(hf_config, "attn_logit_softcapping", None) or None
    names = set()
    for heads in {kind.heads for kind in layer_kinds(hf_config)}:
        q, k = (
            torch.empty(1, 1, count, heads.dim, dtype=DTYPES[config.dtype], device=device)
            for count in (heads.query, heads.key)
        )
        try:
            kernel = kernels.select(q, k, softcap, attention.kernel, attention.deterministic, heads.value_dim)
        except ValueError as error:
            raise ConfigError(str(error).replace("kernel=", "attention.kernel=")) from error
        names.add(kernel.name)
    if (reason := device_refusal(hf_config, device, DTYPES[config.dtype], attention.deterministic)) is not None:
        raise ConfigError(
            f"model.architecture.{reason}" if config.path is None else f"model.path={config.path}: {reason}"
        )
    return sorted(names)


def experts_of(config: PreTrainedConfig) -> tuple[int, int]:
    """Experts of a layer, and the number that a token is routed to; (1, 1) where there are none."""
    if config.model_type == "nemotron_h" and "moe" not in config.layer_types:
        return 1, 1
    experts, active = (
        next((x for name in names if (x := getattr(config, name, None))), 1) for names in (_EXPERTS, _ACTIVE)
    )
    return experts, min(active, experts)


def logit_scale(config: PreTrainedConfig) -> float:
    """What a model multiplies its logits by, before they are capped."""
    if config.model_type.startswith("granite") or config.model_type == "minicpm3":
        return 1 / config.logits_scaling
    if config.model_type == "hyperclovax":
        return config.logits_scaling
    given = getattr(config, "lm_head_multiplier" if config.model_type == "falcon_h1" else "logit_scale", None)
    return 1.0 if given is None else given
