"""The trained model in Hugging Face form, for any other program: what it was loaded as, with other weights.

    runs/NAME/model/            config.json, weights (safetensors), generation_config.json, tokenizer
    runs/NAME/model.partial/    one being written, or what a killed run left

generation_config.json is the file that the model came with, byte for byte: transformers would refuse to write many a
published one, such as a temperature without do_sample. `rehearse` writes all but the weights before step 1.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import transformers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ringflash.errors import ConfigError, DiskError, in_one_line
from ringflash.training import metrics
from ringflash.training.divergence import check_weights
from ringflash.training.files import remove, writing
from ringflash.training.world import World

GENERATION = "generation_config.json"


def export(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    generation: bytes | None = None,
) -> Path:
    """Write config, weights (safetensors) and tokenizer to `folder`; all ranks call it.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it with transformers' own attention. generation: the
    contents of generation_config.json; None: the model's own. Raises DivergedError where a weight is not finite.
    """
    check_weights(engine, world, folder)
    model, aside = engine.module.model, folder.with_name(folder.name + ".partial")
    # ZeRO 3 holds a part of each weight on each rank; rank 0 needs them whole.
    parameters = list(model.parameters()) if engine.zero_optimization_partition_weights() else []
    with (
        world.own_pace(f"exporting {folder}"),
        deepspeed.zero.GatheredParameters(parameters, modifier_rank=None),
    ):
        if world.is_first:
            with writing(folder):
                remove(aside)
                _write(model, aside, tokenizer, generation)
                remove(folder)
                os.rename(aside, folder)
    return folder


def generation_file(path: str | None) -> bytes | None:
    """The contents of generation_config.json in a model's folder, if it has one."""
    file = Path(path, GENERATION) if path else None
    return file.read_bytes() if file is not None and file.is_file() else None


def rehearse(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation: bytes | None, output_dir: Path, source: str
) -> None:
    """Write what a run writes at its end below `output_dir`, all but the weights, and delete it.

    source: the setting that the model came from. Raises ConfigError for what would fail after the last step.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=output_dir, prefix=".rehearsal-")
    except OSError as error:
        raise ConfigError(f"output_dir={output_dir} cannot be written: {error.strerror}") from error
    with scratch as name:
        try:
            with writing(output_dir):
                _write(model, Path(name, "model"), tokenizer, generation, state_dict={})
        except DiskError:
            raise
        except Exception as error:  # transformers and tokenizers share no base class
            raise ConfigError(f"{source}: the trained model could not be exported: {in_one_line(error)}") from error
        metrics.plot(Path(name), None)


def _write(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, generation: bytes | None, **options: Any
) -> None:
    transformers.utils.logging.disable_progress_bar()
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, **options)
    finally:
        model.generation_config = own
    if generation is None:
        own.to_json_file(folder / GENERATION, use_diff=True, keys_to_pop=["compile_config"])
    else:
        (folder / GENERATION).write_bytes(generation)
    tokenizer.save_pretrained(folder)
