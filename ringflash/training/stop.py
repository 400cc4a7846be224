"""Graceful stop: after SIGUSR1, a run finishes its step, writes a checkpoint, and ends without an error.

The signal may go to any of its ranks. A scheduler announces the end of a job by a signal, and the launchers pass it on.
One rank may get it during one step and another during the next, so all ranks agree after each step.

Whoever started the run sees exit code 75. torchrun and DeepSpeed's launcher would report such a code of a rank as a
failure. Under these, ranks end with 0 and leave a file, by which launch/with_signals.py and launch/slurm.sh know.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from ringflash.distributed import launcher
from ringflash.distributed.world import World

SIGNAL = signal.SIGUSR1
INCOMPLETE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
NOTE = "RINGFLASH_STOPPED"

_requested = threading.Event()


def install_handler() -> None:
    """Make SIGUSR1 request a stop instead of ending this process. The main thread calls this.

    Launchers start the ranks with the signal blocked, so one that came earlier arrives now.
    """
    signal.signal(SIGNAL, lambda number, frame: _requested.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})


def requested(world: World) -> bool:
    """Whether any rank has got the signal. All ranks call this after a step, with the same result."""
    return world.any(_requested.is_set())


def exit_code() -> int:
    """The exit code of a rank whose run was stopped before its last step. Also leaves the file."""
    if note := os.environ.get(NOTE):
        Path(note).touch()
    return 0 if launcher.is_torchrun_or_deepspeed() else INCOMPLETE
