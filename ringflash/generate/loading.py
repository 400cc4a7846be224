"""Load what a command needs to read long text: the text, a model or an adapter, its tokenizer, and a cache."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ringflash.data.text import decoded
from ringflash.data.tokenizer import Encoder, encoder, load_tokenizer, tokenizer_size
from ringflash.distributed.world import World
from ringflash.errors import ConfigError, hub_hint, reason
from ringflash.generate.settings import ReadConfig
from ringflash.models import AttentionConfig, FusedConfig, ModelConfig, RingCache, build_model, fuse_layers
from ringflash.models.configuration import attention_kernels
from ringflash.models.lora import BASE, ROPE, LoraConfig, is_adapter, merge, read_fields
from ringflash.models.rope import check_positions

STDIN = "-"


def text_of(name: str, path: str) -> str:
    """The text of a file, or of standard input (-). Raises ConfigError, with `name`, if it is empty or not UTF-8."""
    where = "standard input" if path == STDIN else f"{name}={path}"
    try:
        held = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror or reason(error)}") from error
    text = decoded(held, where, 0)
    if not text.strip():
        raise ConfigError(f"{where} {'holds white space alone' if text else 'is empty'}")
    return text


def load_model(config: ReadConfig, device: torch.device) -> PreTrainedModel:
    """The model for generating, with fused layers on a GPU. Of its generation_config.json, only eos_token_id counts.

    Raises ConfigError, naming the command's setting, if it cannot be loaded or cannot run on the ring.
    """
    disable_progress_bar()
    _check_folder("model", config.model)
    try:
        base = _base_of(config)
        adapter = None if base is None else config.model
        settings = ModelConfig(
            path=base or config.model,
            rope_parameters={} if adapter is None else read_fields(adapter).get(ROPE) or {},
            lora=LoraConfig(path=adapter),
            dtype=config.dtype,
            untested_family=config.untested_family,
            rope_length=config.rope_length,
        )
        attention = AttentionConfig(kernel=config.kernel)
        model = build_model(settings).eval()
        if adapter is not None:
            merge(model, adapter)
        attention_kernels(settings, attention, model.config, device)
    except ConfigError as error:
        raise ConfigError(_in_own_settings(config, str(error))) from error
    # generate would take what no setting here says, such as a repetition penalty, which also counts the document
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    fuse_layers(model.to(device), FusedConfig(), device)  # type: ignore[arg-type]
    return model


def ends_of(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's, and the tokenizer's end of text."""
    found = model.generation_config.eos_token_id or []
    return [*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id]


def _check_folder(name: str, folder: str) -> None:
    if not os.path.isdir(folder):  # pathlib raises for a name that is too long
        raise ConfigError(
            f"{name}={folder} is not a folder that exists: it must be a Hugging Face model folder{hub_hint(folder)}"
        )


def _base_of(config: ReadConfig) -> str | None:
    """The folder of the model that an adapter was trained on; None if model=... is no adapter."""
    if not is_adapter(config.model):
        if config.base is not None:
            raise ConfigError(f"base={config.base} is of an adapter, and model={config.model} is none: leave base out")
        return None
    if config.base is not None:
        _check_folder("base", config.base)
        return config.base
    found = str(read_fields(config.model).get(BASE))
    if not os.path.isdir(found):
        raise ConfigError(
            f"model={config.model} is an adapter of {BASE}={found[:200]}, which is not a folder that exists: "
            f"base=FOLDER names it{hub_hint(found)}"
        )
    return found


def _in_own_settings(config: ReadConfig, message: str) -> str:
    """A message about the trainer's settings, with those of this command instead."""
    message = message.replace("model.lora needs", f"model={config.model} is an adapter, and needs")
    message = message.replace("model.path=", "base=" if is_adapter(config.model) else "model=")
    message = message.replace("model.lora.path=", "model=").replace("attention.kernel=", "kernel=")
    for name in ("dtype", "rope_length", "untested"):
        message = message.replace(f"model.{name}", name)
    return message


def load_encoder(config: ReadConfig, model: PreTrainedModel) -> tuple[Encoder, Any]:
    """The encoder of texts, and the tokenizer, which decodes. Raises ConfigError if it does not fit the model."""
    name = config.tokenizer or _tokenizer_folder(config)
    try:
        tokenizer = load_tokenizer(name)
        found = encoder(tokenizer, name)
    except ConfigError as error:
        message = str(error).replace("data.tokenizer=", "tokenizer=" if config.tokenizer else "model=")
        raise ConfigError(message + ("" if config.tokenizer else "; tokenizer=FOLDER names another")) from error
    if (size := tokenizer_size(tokenizer)) > model.config.vocab_size:
        raise ConfigError(
            f"tokenizer={name} does not fit model={config.model}: it has {size} tokens, and the model "
            f"vocab_size={model.config.vocab_size}"
        )
    return found, tokenizer


def _tokenizer_folder(config: ReadConfig) -> str:
    """The model's folder; of an adapter without a tokenizer, that of its model."""
    own = os.path.isfile(os.path.join(config.model, "tokenizer_config.json"))
    return config.model if own else _base_of(config) or config.model


def make_cache(config: ReadConfig, model: PreTrainedModel, capacity: int, world: World, what: str) -> RingCache:
    """A cache of `capacity` tokens, shared by all ranks. what: its contents, for error messages.

    Raises ConfigError for a chunk or a length that it cannot have, and if positions or memory do not suffice.
    """
    try:
        cache = RingCache(
            model, capacity, ring=world.ring, chunk=config.chunk, kernel=config.kernel, rope_length=capacity
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not config.extrapolate_positions:
        check_positions(what, capacity, model.config, "extrapolate_positions")
    world.check_room(what, cache.nbytes)
    return cache
