"""Stop: a run that is asked to end finishes its step, writes a checkpoint, and ends without an error.

SIGUSR1 to any of its ranks asks for it. A scheduler announces the end of a job by a signal, and launch/torchrun.sh
passes it on. A rank may be asked during one step and another during the next, so all agree after each step.
"""

from __future__ import annotations

import signal
import threading

import torch

from ringflash.training.world import World

SIGNAL = signal.SIGUSR1

_asked = threading.Event()


def listen() -> None:
    """Let SIGUSR1 ask for the stop instead of ending this process; the main thread calls it."""
    signal.signal(SIGNAL, lambda number, frame: _asked.set())


def asked(world: World) -> bool:
    """Whether any rank was asked to stop; all ranks call it after a step, and get the same answer."""
    return bool(world.max(torch.tensor(float(_asked.is_set()), device=world.device)).item())
