"""A command over several ranks: the error of a rank that fails alone is what is reported."""

import os
import sys

from tests import forked

COMMAND = """
from ringflash.command import ReadConfig, command, start

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
