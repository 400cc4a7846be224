"""A step reads no memory before it is written: with NaN in all that torch.empty gives, it is bit for bit the same.

On a GPU such memory has whatever was there before, so a read of it shows in some runs only. Triton's interpreter runs
the fused and the portable kernels, in a separate process, as in tests/fused/test_fused.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

LENGTH = 21  # no multiple of two zigzag ranks: shards are padded
DOCUMENTS = [1, 12, 8]


@contextmanager
def poisoned() -> Iterator[None]:
    """While entered, new memory has NaN, or the largest integer, where nothing was written."""
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)


def step(ranks: int) -> dict[str, Tensor]:
    """Loss, gradients and updated weights of a step on a ring of `ranks` in this process, by the fused kernels."""
    from ringflash import Loopback
    from ringflash.models import AttentionConfig, FusedConfig, fuse_layers, ring_inputs
    from ringflash.training.engine import TrainedModel
    from ringflash.training.memory import MemoryConfig
    from ringflash.training.optimizers.build import build_optimizer
    from ringflash.training.optimizers.config import OptimConfig
    from tests.models.cases import tiny

    model = tiny("qwen3")
    assert fuse_layers(model, FusedConfig(), torch.device("cpu")) == ["norm", "rotary", "mlp"]
    memory = MemoryConfig(zero=0, recompute=True, mlp_tile=15, loss_tile=8)
    trained = TrainedModel(model, memory, AttentionConfig(kernel="blocked"), fused_loss=True)
    optimizer = build_optimizer(trained, OptimConfig(), clips=True)
    ids = torch.randint(1, 97, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    loss = trained(**ring_inputs(ids, ids, ring=Loopback(ranks), documents=DOCUMENTS))
    loss.backward()
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in trained.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    return {"loss": loss.detach()} | gradients | {name: p.detach() for name, p in trained.named_parameters()}


def changed(ranks: int) -> list[str]:
    """What of a step's results is not what it is with memory as it comes."""
    as_it_comes = step(ranks)
    with poisoned():
        found = step(ranks)
    return [name for name, x in as_it_comes.items() if not torch.equal(x, found[name])]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_reads_nothing_that_was_not_written(interpreting, ranks):
    assert interpreting("tests.training.test_poisoned", "changed", ranks) == []
