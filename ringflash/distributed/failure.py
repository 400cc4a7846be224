"""Failure: a run that fails prints one line, from one process, and exits with a code other than 0.

There are two kinds of errors:

- All ranks raise ConfigError and DivergedError, and one of them prints it.
- Any other error may occur on one rank while the others wait for it in the ring. The first rank to fail prints its
  traceback and a line with its rank. The others, whose transfers then break, print nothing.

A rank whose process is killed prints nothing, and the others' transfers break. They leave the report to the launcher,
which ends them. If it does not, as when a whole machine is gone, they report the lost connection.

A signal ends a rank at once, and its launcher reports the signal; a process without a launcher reports it itself. A
launcher that is killed does not end its ranks, so each rank watches for that and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch.distributed as dist

from ringflash.distributed import launcher
from ringflash.errors import ConfigError, DiskError, DivergedError, GpuMemoryError

ON_ALL_RANKS = (ConfigError, DivergedError)  # raised by every rank: one line is enough
PATIENCE = 5.0  # seconds that a silent rank waits for the one that reports
LOST_CONNECTION = (  # in messages of gloo, the store and NCCL
    "Connection closed by peer", "Connection reset by peer", "Connection was likely closed", "ncclRemoteError",
)  # fmt: skip
POLL = 1.0  # seconds between two checks of the launcher

_RANK, _MESSAGE = "ringflash/first-failure", "ringflash/first-failure/message"


@contextlib.contextmanager
def one_line(parent: int) -> Iterator[None]:
    """Print an exception as one line on stderr and exit with code 1; also exit when the launcher is gone.

    parent: the process that started this one, read when this one began.
    """
    if "WORLD_SIZE" not in os.environ:
        report_signals()
    elif launcher.is_torchrun_or_deepspeed():
        threading.Thread(target=_end_with_launcher, args=(parent,), name="launcher-watch", daemon=True).start()
    try:
        yield
    except Exception as error:
        lost = lost_peer(error)
        if lost:
            time.sleep(PATIENCE)
        if not claim_report(error):
            # The launcher ends all ranks as soon as one exits, so the rank that reports must exit first.
            time.sleep(PATIENCE)
            if dist.is_initialized():
                _report_to_torchrun(f"rank {launcher.rank()} stopped: another rank failed first")
                _end(1)
        if not isinstance(error, ConfigError):
            print(file=sys.stderr)  # below a progress bar
        if not lost and not isinstance(error, (*ON_ALL_RANKS, DiskError, GpuMemoryError)):
            traceback.print_exc()
        print(describe(error), file=sys.stderr, flush=True)
        _report_to_torchrun(describe(error))
        _end(1)


def report_signals() -> None:
    """Let SIGINT and SIGTERM end this process with one line and exit code 130 or 143."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: object) -> None:
    print(f"\n{stopped(number)}", file=sys.stderr, flush=True)
    _end(128 + number)


def stopped(number: int) -> str:
    """The line for a run that a signal ended."""
    return f"ringflash: stopped by {signal.Signals(number).name}; resume=auto continues from the last checkpoint"


def _end_with_launcher(parent: int) -> None:
    """Exit once the launcher that started this process is gone."""
    parents = _launching_processes(parent)
    while _launching_processes(os.getppid()) == parents:
        time.sleep(POLL)
    if launcher.local_rank() == 0:
        print(f"\nringflash: rank {launcher.rank()} ends: its launcher was killed", file=sys.stderr, flush=True)
    _end(1)


def _launching_processes(parent: int) -> tuple[int, int | None]:
    """The parent process, and under deepspeed also its parent: the inner launcher outlives the outer one."""
    if os.environ.get("CROSS_SIZE") != "1":
        return parent, None
    with contextlib.suppress(psutil.NoSuchProcess):
        return parent, psutil.Process(parent).ppid()
    return parent, None


def describe(error: BaseException) -> str:
    """The line: the message of an error that all ranks raise, or else the rank, the kind of error and its message."""
    message = " ".join(str(error).split())
    if isinstance(error, ON_ALL_RANKS):
        return f"ringflash: {message}"
    if lost_peer(error):
        return f"ringflash: rank {launcher.rank()} lost the connection to a rank whose process has ended: {message}"
    where = traceback.extract_tb(error.__traceback__)[-1:] if not message else []
    message = message or " ".join(f"in {frame.name}, {frame.filename}:{frame.lineno}" for frame in where)
    return f"ringflash: rank {launcher.rank()} failed: {type(error).__name__}: {message}"


def lost_peer(error: BaseException) -> bool:
    """Whether a gloo or NCCL transfer, or a store call, failed because another rank's process has ended."""
    return isinstance(error, RuntimeError) and any(part in str(error) for part in LOST_CONNECTION)


def _report_to_torchrun(message: str) -> None:
    """Write the line to the file that torchrun reads when a process fails."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def claim_report(error: BaseException) -> bool:
    """Whether this rank reports its error. Only the first rank to fail does, which the store records.

    Before the ranks are connected, rank 0 reports, since it raises the same error.
    """
    rank = os.environ.get("RANK", "0")  # not launcher.rank(), which may have raised the error
    if not dist.is_initialized():
        return rank == "0"
    try:
        store = dist.distributed_c10d._get_default_store()
        mine = store.compare_set(_RANK, "", rank) == rank.encode()
        if mine:
            store.set(_MESSAGE, describe(error).removeprefix("ringflash: "))
    except Exception:  # the rank that held the store is gone: two lines are better than none
        return True
    return mine


def first_failure(store: dist.Store) -> str | None:
    """The report of the rank that failed first, if any has failed."""
    return store.get(_MESSAGE).decode() if store.check([_MESSAGE]) else None


def _end(code: int) -> None:
    """Exit without waiting for other ranks: destructors of a broken process group may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
