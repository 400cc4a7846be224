"""Models on the ring's attention: from random weights, or from a Hugging Face folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ringflash.errors import ConfigError, in_one_line
from ringflash.models.configuration import DTYPES, ModelConfig, read_config
from ringflash.models.families import TEXT_MODELS, TEXT_NAMES
from ringflash.models.freezing import freeze
from ringflash.models.linear_dtype import use_float8
from ringflash.models.lora import add_lora
from ringflash.models.quantized import quantization, without_repacking
from ringflash.models.rope_length import fix_rope_length, has_length_dependent_rope, rope_per_document

# What makes a model of random weights, from (configuration, options), and that of a folder, from (path, and the same).
Makers = tuple[Callable[..., PreTrainedModel], Callable[..., PreTrainedModel]]
# What the names of weights that are not of the text model begin with.
OTHER_SENSES = re.compile(r"(model\.)?(vision|visual|audio|embed_vision|embed_audio|multi_modal)")


def build_model(config: ModelConfig, makers: Makers | None = None) -> PreTrainedModel:
    """The model of a ModelConfig, with the ring's attention, in fp32 or bf16, on the current device.

    makers: the functions that build it; by default they build a whole model. Raises ConfigError naming the key if the
    model cannot be built or cannot train on the ring.
    """
    hf_config = read_config(config)
    if config.linear_dtype is not None and DTYPES[config.dtype] != torch.bfloat16:
        raise ConfigError(
            f"model.linear_dtype={config.linear_dtype} needs bf16 weights, and model.dtype={config.dtype} gives fp32 "
            f"here: set model.dtype=bf16"
        )
    options: dict[str, Any] = {"attn_implementation": "ring", "dtype": DTYPES[config.dtype]}
    if (kind := config.lora.quantize_base) is not None:
        options["quantization_config"] = quantization(kind, options["dtype"])
    random, pretrained = makers or (_random, _pretrained)
    try:
        model = random(hf_config, options) if config.path is None else pretrained(config.path, hf_config, options)
    except ConfigError:
        raise
    except Exception as error:  # transformers, safetensors and torch have no error in common
        failed = f"model.path={config.path} has weights that cannot be loaded"
        failed = "model.architecture cannot be built" if config.path is None else failed
        raise ConfigError(f"{failed}: {in_one_line(error)}") from error
    without_repacking(model)
    if config.rope_length is not None:
        try:
            fix_rope_length(model, config.rope_length)
        except ValueError as error:
            raise ConfigError(f"model.rope_length={config.rope_length}: {error}") from error
    elif has_length_dependent_rope(hf_config):
        rope_per_document(model)
    if config.lora.enabled:
        add_lora(model, config.lora)
    if config.linear_dtype is not None:
        use_float8(model)
    freeze(model, config.freeze)
    return model


def _random(hf_config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """A model with random weights."""
    _check_memory(hf_config, options["dtype"])
    return AutoModelForCausalLM.from_config(hf_config, **options)


def _pretrained(path: str, hf_config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """The model of a folder. Raises ConfigError for weights that are missing or of other shapes."""
    loading: Any = AutoModelForCausalLM.from_pretrained(
        path, config=hf_config, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
        key_mapping=names_of_text(hf_config), **options,
    )  # fmt: skip
    model, loaded = loading
    check_loaded(path, *(loaded[f"{kind}_keys"] for kind in ("missing", "mismatched", "unexpected")))
    if names_of_text(hf_config) is not None:
        vars(model).pop("_weight_conversions", None)  # by which it would be saved under the names of the whole model
    return model


def names_of_text(hf_config: PreTrainedConfig) -> dict[str, str] | None:
    """Patterns of the weights' names in a folder of a model of images and text, if its text model is of this family."""
    return TEXT_NAMES if hf_config.model_type in TEXT_MODELS.values() else None


def check_loaded(path: str, missing: Iterable[str], mismatched: Iterable[tuple], unexpected: Iterable[str]) -> None:
    """Raise ConfigError for weights that are missing, of other shapes, as (name, found, expected), or too many.

    transformers would fill missing weights at random, and drop layers beyond config.json.
    """
    if lacking := sorted(missing):
        raise ConfigError(f"model.path={path} lacks {len(lacking)} weights of its config.json, such as {lacking[0]}")
    for name, found, expected in sorted(mismatched):
        raise ConfigError(f"model.path={path} has {name} {[*found]}, and its config.json asks for {[*expected]}")
    of_text = (name for name in unexpected if not OTHER_SENSES.match(name))
    if more := sorted(name for name in of_text if re.search(r"\.layers\.\d+\..*weight", name)):
        raise ConfigError(f"model.path={path} has {len(more)} weights that its config.json lacks, such as {more[0]}")


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
