"""Graceful stop: after SIGUSR1, a run finishes its step, writes a checkpoint, and ends without an error.

The signal may go to any of its ranks. A scheduler announces the end of a job by a signal, and launch/torchrun.sh passes
it on. One rank may get it during one step and another during the next, so all ranks agree after each step.
"""

from __future__ import annotations

import signal
import threading

import torch

from ringflash.training.world import World

SIGNAL = signal.SIGUSR1

_requested = threading.Event()


def install_handler() -> None:
    """Make SIGUSR1 request a stop instead of ending this process. The main thread calls this."""
    signal.signal(SIGNAL, lambda number, frame: _requested.set())


def requested(world: World) -> bool:
    """Whether any rank has got the signal. All ranks call this after a step, with the same result."""
    return bool(world.max(torch.tensor(float(_requested.is_set()), device=world.device)).item())
