"""Commands that read long text: they parse their settings, run on ranks, and report on standard error."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from ringflash.distributed import failure
from ringflash.distributed.parallel import ParallelConfig
from ringflash.distributed.world import World, join
from ringflash.generate.settings import ReadConfig

Config = TypeVar("Config", bound=ReadConfig)


def command(kind: type[Config], about: str, run: Callable[[Config, World], object], arguments: list[str]) -> None:
    """Parse a command's settings, connect the ranks, and run it. about: text of --help above the settings."""
    if {"--help", "-h"} & {*arguments}:
        print(f"{about}\n{kind.settings_help()}")
        return
    config = kind.parse([x for x in arguments if not x.startswith("--local_rank=")])
    world = join(ParallelConfig(layout="zigzag"))
    run(config, world)  # after an error the group stays: by its store, the rank that failed first reports
    world.watchdog.close()
    dist.destroy_process_group()


def start(main: Callable[[list[str]], None]) -> None:
    """Run a command's main as a program, whose errors are one line each."""
    with failure.one_line(os.getppid()):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to resume
        main(sys.argv[1:])


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def report(world: World, line: str) -> None:
    """Print a line on rank 0's standard error."""
    if world.is_first:
        sys.stdout.flush()
        print(f"ringflash: {line}", file=sys.stderr, flush=True)
