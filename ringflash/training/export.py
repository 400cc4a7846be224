"""The trained model in Hugging Face form, for any other program."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import transformers
from transformers import PreTrainedTokenizerBase

from ringflash.training.divergence import check_weights
from ringflash.training.world import World


def export(engine: deepspeed.DeepSpeedEngine, folder: Path, tokenizer: PreTrainedTokenizerBase, world: World) -> Path:
    """Write config, weights (safetensors) and tokenizer to `folder`; all ranks call it.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it with transformers' own attention. Raises
    DivergedError where a weight is not finite.
    """
    check_weights(engine, world, folder)
    model = engine.module.model
    # ZeRO 3 holds a part of each weight on each rank; rank 0 needs them whole.
    parameters = list(model.parameters()) if engine.zero_optimization_partition_weights() else []
    with (
        world.own_pace(f"exporting {folder}"),
        deepspeed.zero.GatheredParameters(parameters, modifier_rank=None),
    ):
        if world.is_first:
            transformers.utils.logging.disable_progress_bar()
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return folder
