"""A rank reads its number, its machine's ranks and its GPU from the environment of whichever launcher started it."""

import pytest
import torch

from ringflash.distributed import launcher
from ringflash.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "here"),
    [
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),  # torchrun
        ({"WORLD_SIZE": "16", "LOCAL_SIZE": "8"}, 8),  # deepspeed
        ({"WORLD_SIZE": "16"}, 16),
        ({}, 1),
    ],
)
def test_the_ranks_of_a_machine_are_read_from_the_launchers_environment(monkeypatch, given, here):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert launcher.local_world_size() == here


def test_a_rank_that_knows_only_its_local_rank_takes_the_gpu_of_that_number(monkeypatch):
    """Slurm's srun or mpirun without torchrun: 16 ranks of two machines, 8 GPUs on each."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert launcher.local_device() == torch.device("cuda", 3)
    assert taken == [3]
    assert launcher.local_world_size() == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "", "RANK": "0"}, "WORLD_SIZE= must be a whole number, 1 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be a whole number, 1 or more"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "RANK=one must be a whole number, 0 or more"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 must be less than WORLD_SIZE=2"),
        ({"WORLD_SIZE": "8", "RANK": None}, "WORLD_SIZE=8 is set and RANK is not"),
        ({"WORLD_SIZE": "8", "LOCAL_RANK": None}, "WORLD_SIZE=8 is set and LOCAL_RANK is not"),
        ({"WORLD_SIZE": None, "SLURM_STEP_NUM_TASKS": "2"}, "each of these processes would be a run of its own"),
    ],
    ids=str,
)
def test_an_environment_of_no_launcher_is_refused_by_its_variable(monkeypatch, given, message):
    for name, value in ({"RANK": "0", "LOCAL_RANK": "0"} | given).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        launcher.complete_environment()
