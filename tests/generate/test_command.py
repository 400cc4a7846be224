"""Commands: a rank that fails alone is what is reported, and a model has fused layers where training has them."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import pytest
import torch

from ringflash.generate.loading import load_model
from ringflash.generate.settings import ReadConfig
from tests import forked
from tests.models.cases import tiny

COMMAND = """
from ringflash.generate.command import command, start
from ringflash.generate.settings import ReadConfig

def run(config, world):
    if world.rank == 1:
        raise ArithmeticError("the model is broken")
    world.broadcast("text")

start(lambda arguments: command(ReadConfig, "", run, arguments))
"""


def test_the_rank_that_fails_alone_reports_and_not_the_one_that_lost_it(tmp_path):
    (tmp_path / "read.py").write_text(COMMAND)
    environment = {name: x for name, x in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    result = forked.run([*torchrun, str(tmp_path / "read.py"), "model=m"], env=environment)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("ringflash:")]
    assert lines == ["ringflash: rank 1 failed: ArithmeticError: the model is broken"]


def fused_modules(folder: str) -> int:
    """How many modules of the model that a command loads have a forward other than their own."""
    model = load_model(ReadConfig(model=folder, kernel="blocked"), torch.device("cpu"))
    return sum("forward" in vars(module) for module in model.modules())


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_command_loads_a_model_with_fused_layers_where_training_has_them(interpreting, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    assert fused_modules(str(tmp_path)) == 0  # a CPU
    fused = interpreting("tests.generate.test_command", "fused_modules", str(tmp_path))
    assert fused == 5 + 2 + 2 + 2  # norms, two per layer
