"""Run a launcher, and pass signals on to the ranks that it starts. torchrun.sh and deepspeed.sh use this.

    python launch/with_signals.py torchrun --nproc-per-node 8 train.py experiment=qwen3-0.5b-128k

SIGUSR1 or SIGTERM lets the run finish its step, write a checkpoint and end. Ctrl-C, or SIGTERM again, ends it at once.
The exit code is the launcher's, or 75 if the run was stopped before its last step.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

INCOMPLETE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
NOTE = "RINGFLASH_STOPPED"  # the file that ranks leave when they end before the last step


def main() -> int:
    """Start the launcher and wait for it. Returns the exit code."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0 if len(sys.argv) > 1 else 2
    with stop_note() as stopped:
        hold_signal()
        try:
            launcher = subprocess.Popen(sys.argv[1:])
        except OSError as error:
            print(f"launch/with_signals.py: {sys.argv[1]} cannot be started: {error.strerror}", file=sys.stderr)
            return 127
        terms = 0

        def receive(number: int, frame: object) -> None:
            nonlocal terms
            terms += number == signal.SIGTERM
            if terms > 1:
                launcher.terminate()
            else:
                stop_ranks(launcher.pid)

        signal.signal(signal.SIGUSR1, receive)
        signal.signal(signal.SIGTERM, receive)
        signal.signal(signal.SIGINT, lambda number, frame: None)  # a terminal sends it to the launcher, too
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        code = launcher.wait()
        if code == 0 and stopped():
            return INCOMPLETE
        return code if code >= 0 else 128 - code


@contextlib.contextmanager
def stop_note() -> Iterator[Callable[[], bool]]:
    """Name the file for the ranks, unless the environment names one already. Yields a function: whether it is there."""
    with tempfile.TemporaryDirectory(prefix="ringflash-") as folder:
        note = Path(folder) / "stopped"
        os.environ.setdefault(NOTE, str(note))
        yield note.exists


def hold_signal() -> None:
    """Hold SIGUSR1 back from this thread, and from processes that it starts until they listen: it would end them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def stop_ranks(launcher: int) -> None:
    """Have a thread send SIGUSR1 to the ranks that a launcher starts, as soon as there is one."""
    threading.Thread(target=_stop_ranks, args=(launcher,), daemon=True).start()


def _stop_ranks(launcher: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        while not (ranks := _ranks(psutil.Process(launcher))):
            time.sleep(0.2)
        print("\nringflash: the run ends after its step, with a checkpoint", file=sys.stderr, flush=True)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR1)


def _ranks(launcher: psutil.Process) -> list[psutil.Process]:
    """The processes below a launcher that are the first to have a LOCAL_RANK."""
    found = []
    for process in launcher.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may have ended
            parent = process.parent()
            if "LOCAL_RANK" in process.environ() and parent and "LOCAL_RANK" not in parent.environ():
                found.append(process)
    return found


if __name__ == "__main__":
    sys.exit(main())
