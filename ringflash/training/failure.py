"""How a run ends before its time: one clear line, from one process, and an exit code that is not 0.

Errors come in two kinds. A setting that cannot work and a run that diverges meet every rank alike: one reports it.
Anything else may strike one rank while the others wait for it in the ring; the first to fail says who and why, with its
traceback above, and the others, whose transfers then break, stay silent.

A signal ends a rank at once, and its launcher reports it; a process alone reports it itself. A launcher that was killed
ends nobody: then each rank ends by itself.
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

from ringflash.errors import ConfigError, DiskError, DivergedError

ALIKE = (ConfigError, DivergedError)  # what every rank meets: one line is enough
PATIENCE = 5.0  # seconds that a silent rank leaves to the one that speaks
LOOK = 1.0  # seconds between two looks at the launcher

_RANK, _MESSAGE = "ringflash/first-failure", "ringflash/first-failure/message"


@contextlib.contextmanager
def one_line(parent: int) -> Iterator[None]:
    """Turn an exception into its line on stderr and end the process with code 1; end it with its launcher, too.

    parent: the process that started this one, asked when this one began.
    """
    if "WORLD_SIZE" not in os.environ:
        report_signals()
    elif {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"} & os.environ.keys():  # torchrun's, deepspeed's; no shell ends with them
        threading.Thread(target=_end_with_launcher, args=(parent,), name="launcher-watch", daemon=True).start()
    try:
        yield
    except Exception as error:
        if not claim(error):
            # The launcher ends all ranks as soon as one leaves: the one that speaks must have finished by then.
            time.sleep(PATIENCE)
            if dist.is_initialized():
                _report_to_torchrun(f"rank {_rank()} stopped: another rank failed first")
                _end(1)
        if not isinstance(error, ConfigError):
            print(file=sys.stderr)  # below a progress bar
        if not isinstance(error, (*ALIKE, DiskError)):
            traceback.print_exc()
        print(describe(error), file=sys.stderr, flush=True)
        _report_to_torchrun(describe(error))
        _end(1)


def report_signals() -> None:
    """Have SIGINT and SIGTERM end this process with one line, and 130 or 143."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: object) -> None:
    print(f"\n{stopped(number)}", file=sys.stderr, flush=True)
    _end(128 + number)


def stopped(number: int) -> str:
    """The line of a run that a signal ended."""
    return f"ringflash: stopped by {signal.Signals(number).name}; resume=auto continues from the last checkpoint"


def _end_with_launcher(parent: int) -> None:
    """End once the launcher is gone, which started this process."""
    launcher = _launcher(parent)
    while _launcher(os.getppid()) == launcher:
        time.sleep(LOOK)
    if os.environ.get("LOCAL_RANK") == "0":
        print(f"\nringflash: rank {_rank()} ends: its launcher was killed", file=sys.stderr, flush=True)
    _end(1)


def _launcher(parent: int) -> tuple[int, int | None]:
    """The parent, and what started that: deepspeed's launcher on one machine, which outlives its own."""
    if os.environ.get("CROSS_SIZE") != "1":
        return parent, None
    with contextlib.suppress(psutil.NoSuchProcess):
        return parent, psutil.Process(parent).ppid()
    return parent, None


def describe(error: BaseException) -> str:
    """The line: the message of an error that all ranks meet alike, or the rank, the kind of error and its message."""
    message = " ".join(str(error).split())
    if isinstance(error, ALIKE):
        return f"ringflash: {message}"
    where = traceback.extract_tb(error.__traceback__)[-1:] if not message else []
    message = message or " ".join(f"in {frame.name}, {frame.filename}:{frame.lineno}" for frame in where)
    return f"ringflash: rank {_rank()} failed: {type(error).__name__}: {message}"


def _report_to_torchrun(message: str) -> None:
    """Leave the line where torchrun looks for what it reports of a process that failed."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def claim(error: BaseException) -> bool:
    """Whether this rank reports its error: the first to fail does, which the others learn from the store.

    Before ranks can reach each other that is rank 0, which fails alike.
    """
    rank = _rank()
    if not dist.is_initialized():
        return rank == "0"
    try:
        store = dist.distributed_c10d._get_default_store()
        mine = store.compare_set(_RANK, "", rank) == rank.encode()
        if mine:
            store.set(_MESSAGE, describe(error).removeprefix("ringflash: "))
    except Exception:  # the store went with the rank that held it: better two lines than none
        return True
    return mine


def first(store: dist.Store) -> str | None:
    """What the rank that failed first reports, if any rank has failed."""
    return store.get(_MESSAGE).decode() if store.check([_MESSAGE]) else None


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _end(code: int) -> None:
    """Leave without waiting for other ranks: destructors of a broken process group may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
