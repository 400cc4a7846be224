"""Running out of GPU memory ends in one line that names the part of the step and what to set."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ringflash import kernels
from ringflash.distributed.failure import describe
from ringflash.errors import GpuMemoryError
from ringflash.models import ring_inputs
from ringflash.ring.transport import Loopback
from ringflash.training import engine, loss
from ringflash.training.engine import TrainedModel
from ringflash.training.memory import MemoryConfig
from ringflash.training.out_of_memory import PARTS, explained, levers
from tests.models.cases import tiny

CUDA = (
    "CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1 GiB is free."
)


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError(CUDA)


def step(memory=None, ranks=1):
    """A forward and a backward of a tiny model."""
    memory = memory or MemoryConfig(recompute=True)
    tokens = torch.randint(1, 97, (1, 32))
    with explained(memory, ranks):
        model = TrainedModel(tiny("qwen3").train(), memory, engine.AttentionConfig())
        model(**ring_inputs(tokens, tokens, ring=Loopback(1))).backward()


def test_a_step_with_enough_memory_is_left_alone():
    step()


def test_the_loss_is_named_with_its_tile(monkeypatch):
    monkeypatch.setattr(loss, "_cross_entropy", out_of_memory)
    with pytest.raises(GpuMemoryError) as caught:
        step()
    assert describe(caught.value) == (
        "ringflash: rank 0 failed: GpuMemoryError: out of GPU memory in the loss, which holds a tile of logits, which "
        "asked for 2.32 GiB. To need less, set memory.loss_tile to fewer tokens, or memory.attention_results=host "
        "memory.layer_inputs=host, or fewer tokens per GPU (data.sequence_length, optim.micro_batch, or "
        "more GPUs)"
    )


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_attention_is_named_with_its_pass(monkeypatch, pass_):
    real = kernels.select
    monkeypatch.setattr(kernels, "select", lambda *args: dataclasses.replace(real(*args), **{pass_: out_of_memory}))
    where = "attention" if pass_ == "forward" else "attention, in its backward"
    with pytest.raises(GpuMemoryError, match=rf"^out of GPU memory in {where}, which asked for 2.32 GiB\."):
        step()


@pytest.mark.parametrize(
    ("memory", "ranks", "named"),
    [
        (MemoryConfig(), 1, "set memory.recompute=true, or fewer tokens"),
        (MemoryConfig(recompute=True, zero=1), 8, "layer_inputs=host, or memory.zero=3, or fewer"),
        (MemoryConfig(recompute=True, attention_results="host", layer_inputs="host"), 1, "set fewer tokens per GPU"),
    ],
    ids=["plain", "ranks", "all-used"],
)
def test_only_settings_that_need_less_are_named(monkeypatch, memory, ranks, named):
    monkeypatch.setattr(TrainedModel, "forward", out_of_memory)
    with pytest.raises(GpuMemoryError) as caught:
        step(memory, ranks)
    assert named in str(caught.value)


def test_the_optimizer_is_named_with_smaller_states():
    assert levers("the optimizer's step", MemoryConfig(recompute=True), 1)[1] == "memory.optimizer_states=bf16 or host"
    assert levers("an MLP", MemoryConfig(recompute=True), 1)[0] == "memory.mlp_tile to fewer tokens"


def test_every_part_of_this_repository_exists():
    root = Path(__file__).parents[2]
    assert [where for where, _ in PARTS if where.startswith("ringflash/") and not (root / where).exists()] == []
