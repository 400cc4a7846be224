"""The launcher's environment: which rank this process is. Without a launcher, it is the only rank of a run.

torchrun sets RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE. deepspeed names the last one LOCAL_SIZE.
"""

from __future__ import annotations

import os
import socket

import torch

from ringflash.errors import ConfigError


def rank() -> int:
    """This process's rank."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Ranks of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Ranks on this machine. If the launcher does not set it, all ranks, but at most one per GPU."""
    if (given := _given_local_world_size()) is not None:
        return given
    return min(world_size(), torch.cuda.device_count()) if torch.cuda.is_available() else world_size()


def _given_local_world_size() -> int | None:
    given = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    return next((int(size) for size in given if size), None)


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


def set_environment_of_one() -> None:
    """Set the environment that a launcher would have set, for a process without one."""
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
