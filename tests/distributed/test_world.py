"""The processes' groups, as NCCL makes them. (`test_step.py` and `test_run.py` join over gloo.)"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ringflash.data.config import DataConfig, WeightedSource
from ringflash.distributed import world
from ringflash.distributed.parallel import ParallelConfig
from ringflash.distributed.world import World
from ringflash.errors import ConfigError
from tests.pool import needs_gpus

ROOT = Path(__file__).parents[2]
TWO_RANKS = """
import torch
from ringflash.distributed import world
from ringflash.distributed.parallel import ParallelConfig

joined = world.join(ParallelConfig(ring=2, layout="zigzag"))
options = joined.ring.group._get_backend(joined.device).options
print("high priority", options.is_high_priority_stream)
torch.distributed.destroy_process_group()
"""


def error_of_each(check, given):
    """The error that a rank's check raises for given[rank]."""
    try:
        check(given[dist.get_rank()], torch.device("cpu"))
    except ConfigError as error:
        return str(error)


@pytest.mark.ranks
def test_a_grid_that_machines_of_unequal_size_chose_differently_is_refused_on_every_rank(ranks):
    assert ranks.run(error_of_each, 3, world._check_same_ulysses, (2, 2, 2)) == [None] * 3
    for message in ranks.run(error_of_each, 3, world._check_same_ulysses, (4, 2, 8)):
        assert message.startswith("parallel.ulysses=null resolves to 2 on some machines and to 8 on others")


@pytest.mark.ranks
def test_settings_that_differ_between_machines_are_refused_on_every_rank_and_places_may_differ(ranks):
    alike = [{"optim.lr": 0.1, "seed": 1, "data.cache": rank, "model.path": rank} for rank in range(3)]
    assert ranks.run(error_of_each, 3, world._check_same_settings, alike) == [None] * 3
    found = ranks.run(error_of_each, 3, world._check_same_settings, [*alike[:2], alike[2] | {"optim.lr": 0.2}])
    same = "start all machines with the same settings"
    assert found[:2] == [f"optim.lr differs between ranks, 0.1 on rank 0: {same}"] * 2
    assert found[2] == f"optim.lr differs between ranks, 0.1 on rank 0 and 0.2 on this rank: {same}"


def made_on_rank_0(error):
    """The rank that made a value, or the error that it raised there."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), None, None, None, 0, 1)

    def make():
        if error:
            raise ConfigError(f"refused on rank {world.rank}")
        return world.rank

    try:
        return world.from_rank_0(make)
    except ConfigError as raised:
        return str(raised)


@pytest.mark.ranks
def test_what_rank_0_makes_or_raises_reaches_every_rank(ranks):
    assert ranks.run(made_on_rank_0, 2, False) == [0, 0]
    assert ranks.run(made_on_rank_0, 2, True) == ["refused on rank 0"] * 2


def test_settings_are_named_as_they_are_given_and_sources_may_be_in_other_places():
    config = make_dataclass("Config", [("parallel", ParallelConfig), ("data", DataConfig)])
    kept_in = [DataConfig(sources={"web": WeightedSource(path=path, weight=3)}) for path in ("/here", "/there")]
    here, there = (dict(world._flattened(config(ParallelConfig(ring=4), data))) for data in kept_in)
    assert (here["parallel.ring"], here["data.sources"], here["data.sources.web.weight"]) == (4, ["web"], 3)
    assert {name for name in here if here[name] != there[name]} == {"data.sources.web.path"}


@pytest.mark.gpu
@needs_gpus
def test_a_rings_transfers_run_on_a_stream_of_high_priority(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stdout.split("\n")[:2] == ["high priority True"] * 2, run.stderr[-2000:]
