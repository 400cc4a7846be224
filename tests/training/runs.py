"""Whole runs without a process start: `train.py`'s fit on ranks of the pool, which have imported everything once."""

import contextlib
import io

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from ringflash.training import loop
from ringflash.training.compose import compose
from tests.models.cases import TINY

SHORT = [
    "data=text", "data.held_out=0.3", "data.sequence_length=64", "optim.steps=6", "optim.warmup=1",
    "checkpoint.every=3", "evaluation.every=0", "evaluation.sequences=2", "memory.zero=2", "logger.mode=disabled",
]  # fmt: skip
SMALL = [f"model.architecture.{x}" for x in ("hidden_size=32", "intermediate_size=32", "head_dim=8")]


def tiny_qwen3(folder, vocabulary, **fields):
    """The folder of a small model with tied embeddings and doubled initial weights, which this writes."""
    return tiny_model(folder, "qwen3", **TINY | {"vocab_size": vocabulary, "tie_word_embeddings": True} | fields)


def tiny_model(folder, model_type, **fields):
    """The folder of a small model with doubled initial weights, which this writes."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    model.save_pretrained(folder)
    return folder


def settings(text, *others, model=SMALL):
    """Those of a short run on a folder of text, which leaves all that it writes beside that folder."""
    paths = [f"data.path={text}", f"data.cache={text.parent}/cache", f"output_dir={text.parent}/runs"]
    return [*SHORT, *paths, *model, *others]


def fitted(overrides):
    """What a run raises on this rank, or None, and what it prints."""
    printed, error, threads = io.StringIO(), None, torch.get_num_threads()
    torch.set_num_threads(1)  # threads decide in which order sums are taken, as in launched runs of OMP_NUM_THREADS=1
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(dist, "init_process_group", lambda *args, **options: None)  # the pool's is there already
        patch.setattr(dist, "destroy_process_group", lambda *args: None)
        try:
            loop.fit(*compose(overrides))
        except Exception as raised:
            error = f"{raised}"
    torch.set_num_threads(threads)
    return error, printed.getvalue()
