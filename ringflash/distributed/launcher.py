"""The launcher's environment: which rank this process is. Without a launcher, it is the only rank of a run.

torchrun sets RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE. deepspeed names the last one LOCAL_SIZE.
"""

from __future__ import annotations

import os
import socket

import torch

from ringflash.errors import ConfigError

# The number of processes that srun, Open MPI's mpirun or MPICH's start, none of which connects ranks of torch.
PROCESSES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def rank() -> int:
    """This process's rank."""
    return _number("RANK", least=0, default=0)


def world_size() -> int:
    """Ranks of this run."""
    return _number("WORLD_SIZE", least=1, default=1)


def local_rank() -> int:
    """This process's number on its machine."""
    return _number("LOCAL_RANK", least=0, default=0)


def _number(name: str, least: int, default: int) -> int:
    """The value of a variable. Raises ConfigError if it is not a whole number of at least `least`."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(f"the environment variable {name}={value} must be a whole number, {least} or more")
    return int(value)


def local_world_size() -> int:
    """Ranks on this machine. If the launcher does not set it, all ranks, but at most one per GPU."""
    if (given := _given_local_world_size()) is not None:
        return given
    return min(world_size(), torch.cuda.device_count()) if torch.cuda.is_available() else world_size()


def _given_local_world_size() -> int | None:
    given = (name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if os.environ.get(name))
    return next((_number(name, least=1, default=1) for name in given), None)


def is_torchrun_or_deepspeed() -> bool:
    """Whether torchrun or deepspeed started this process. Both end all ranks as soon as one fails."""
    return bool({"TORCHELASTIC_RUN_ID", "CROSS_SIZE"} & os.environ.keys())


def local_device() -> torch.device:
    """This rank's GPU, made the current one, or the CPU. Raises ConfigError for more ranks here than GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = local_rank()
    here = max(_given_local_world_size() or 1, number + 1)
    if here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} ranks on {socket.gethostname()} but {torch.cuda.device_count()} GPUs: "
            f"start one process per GPU (--nproc-per-node {torch.cuda.device_count()})"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def complete_environment() -> None:
    """Set the environment that a launcher would have set, for a process without one.

    Raises ConfigError if a launcher's variables do not fit together, and for one of several processes without them.
    """
    if "WORLD_SIZE" in os.environ:
        _check_environment()
        return
    for name in PROCESSES:
        if os.environ.get(name, "") not in ("", "0", "1"):
            raise ConfigError(
                f"{name}={os.environ[name]}, but WORLD_SIZE is not set, so each of these processes would be a run of "
                f"its own: start the ranks with launch/slurm.sh or launch/torchrun.sh"
            )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _check_environment() -> None:
    for name in ("RANK", "LOCAL_RANK"):
        if name not in os.environ:
            raise ConfigError(
                f"WORLD_SIZE={world_size()} is set and {name} is not: start the ranks with a launcher, such as "
                f"launch/torchrun.sh, or unset WORLD_SIZE for a run of one rank"
            )
    if rank() >= world_size():
        raise ConfigError(f"RANK={rank()} must be less than WORLD_SIZE={world_size()}")
