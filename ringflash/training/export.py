"""Export: the trained model as a Hugging Face folder, with the configuration that it was loaded with.

    OUTPUT_DIR/NAME/model/            config.json, weights (safetensors), generation_config.json, tokenizer
    OUTPUT_DIR/NAME/model.partial/    one being written, or left by a killed run
    OUTPUT_DIR/NAME/adapter/          with model.lora: adapters in peft's format, tokenizer; model/ has them merged

generation_config.json is copied byte for byte from the folder that the model came from. transformers refuses to write
many published ones, such as a temperature without do_sample. `rehearse` writes all except the weights before step 1.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import transformers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ringflash.distributed.world import World
from ringflash.errors import ConfigError, DiskError, in_one_line
from ringflash.files import remove, replace_folder, writing
from ringflash.models import ModelConfig
from ringflash.models.lora import adapted, write_adapter
from ringflash.models.rope import has_nominal_positions
from ringflash.training.divergence import check_weights
from ringflash.training.zero3 import write_weights

GENERATION = "generation_config.json"


def export(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    path: str | None = None,
    length: int = 0,
) -> Path:
    """Write config, weights (safetensors) and tokenizer to `folder`. All ranks call this.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it with transformers' own attention. path: the model.path
    that training started from. length: that of the sequences trained on, for which config and tokenizer allow. Raises
    DivergedError if a weight is not finite.
    """
    model = engine.module.model
    with _replacing(engine, folder, world) as aside:
        write = functools.partial(_write, model, aside, tokenizer, path, length)
        if engine.zero_optimization_partition_weights() or adapted(model):
            write_weights(model, aside, world, functools.partial(write, state_dict={}))
        elif world.is_first:
            write()
    return folder


def export_adapter(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
) -> Path:
    """Write a model's adapters, as peft does, and tokenizer to `folder`; all ranks call it. config: the model's.

    Raises DivergedError if a weight is not finite.
    """
    model = engine.module.model
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _replacing(engine, folder, world) as aside:
        with deepspeed.zero.GatheredParameters([*adapters.values()], modifier_rank=None):
            weights = {name: p.detach().to("cpu", copy=True) for name, p in adapters.items()}
        if world.is_first:
            remove(aside)
            write_adapter(model, weights, aside, os.path.abspath(config.path or ""), config.rope_parameters)
            tokenizer.save_pretrained(aside)
    return folder


@contextmanager
def _replacing(engine: deepspeed.DeepSpeedEngine, folder: Path, world: World) -> Iterator[Path]:
    """The folder that rank 0 writes, and that replaces `folder` at the end."""
    check_weights(engine, world, folder)
    aside = folder.with_name(folder.name + ".partial")
    with world.without_timeout(f"exporting {folder}"), writing(folder):
        yield aside
        if world.is_first:
            replace_folder(aside, folder)


def generation_file(path: str | None) -> bytes | None:
    """The contents of generation_config.json in a model's folder, if it has one."""
    file = Path(path, GENERATION) if path else None
    return file.read_bytes() if file is not None and file.is_file() else None


def rehearse(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | None, output_dir: Path) -> None:
    """Write everything below `output_dir` that a run writes at its end, except the weights, and delete it.

    path: model.path. Raises ConfigError or DiskError for what would fail after the last step.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=output_dir, prefix=".rehearsal-")
    except OSError as error:
        raise ConfigError(f"output_dir={output_dir} cannot be written: {error.strerror}") from error
    with scratch as name:
        try:
            with writing(output_dir):
                _write(model, Path(name, "model"), tokenizer, path, 0, state_dict={})
        except DiskError:
            raise
        except Exception as error:  # transformers and tokenizers share no base class
            source = "model.architecture" if path is None else f"model.path={path}"
            raise ConfigError(f"{source}: the trained model could not be exported: {in_one_line(error)}") from error


def _write(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    path: str | None,
    length: int,
    **options: Any,
) -> None:
    transformers.utils.logging.disable_progress_bar()
    remove(folder)
    _allow(model, tokenizer, length)
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
    finally:
        model.generation_config = own
    if (generation := generation_file(path)) is not None:
        (folder / GENERATION).write_bytes(generation)
    else:
        own.to_json_file(folder / GENERATION, use_diff=True, keys_to_pop=["compile_config"])


def _allow(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Raise limits to sequences of `length` tokens where that changes no result: engines cut prompts by them."""
    reach = max(length, getattr(model.config, "max_position_embeddings", None) or 0)
    limits: list[tuple[Any, str, int]] = [(tokenizer, "model_max_length", reach)]
    if has_nominal_positions(model.config):
        limits.append((model.config, "max_position_embeddings", length))
    for owner, name, limit in limits:
        if 0 < (getattr(owner, name, None) or 0) < length:
            setattr(owner, name, limit)
