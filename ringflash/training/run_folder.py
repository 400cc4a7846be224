"""The folder of a run, and the lock by which one run at a time uses it.

    OUTPUT_DIR/NAME/      .lock           held by rank 0 until its process ends
                          config.yaml     the resolved configuration
                          metrics.jsonl   one record per step
                          checkpoints/    see `checkpoint`
    OUTPUT_DIR/NAME-2/    the second run of that name, and so on

A new run makes a new folder. With resume=auto, a run uses the newest folder of its name that has steps. It starts
again at step 0 there only if it ended before its first checkpoint. If checkpoints are missing, it is refused.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import re
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

from ringflash.errors import ConfigError
from ringflash.training import metrics

LOCK = ".lock"
VISIBLE = 60.0  # seconds until other machines see a new folder on a network disk: NFS caches that long by default
ENDING = 6.0  # seconds that ranks take to exit after their launcher was killed


@dataclass(frozen=True, eq=False)
class RunFolder:
    """A folder that this process has locked; the kernel releases the lock when the process ends."""

    path: Path
    lock: TextIO


def acquire(output_dir: Path, name: str, resume: str) -> RunFolder:
    """The locked folder of a run: a new one for resume=never, the newest of its name for resume=auto.

    Raises ConfigError for a folder that cannot be used or that a running process has locked, and if resume=auto is
    ambiguous.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        path = _newest_or_first(output_dir, name) if resume == "auto" else _new(output_dir, name)
        run = RunFolder(path, _locked(path))
        (path / "checkpoints").mkdir(exist_ok=True)
        return run
    except OSError as error:
        where = Path(error.filename or output_dir / name)  # no file is named where a disk is full
        reason = f"links to {where.readlink()}, which does not exist" if _dangles(where) else error.strerror
        raise ConfigError(f"output_dir={output_dir} cannot be used: {where}: {reason}") from error


def check_shared(path: Path, output_dir: str) -> None:
    """Raise ConfigError if this machine does not see the folder that rank 0 has locked. This may take a minute."""
    until = time.monotonic() + VISIBLE
    while not (path / LOCK).exists():
        if time.monotonic() > until:
            raise ConfigError(
                f"output_dir={output_dir} must be on a disk that all machines share: {socket.gethostname()} does not "
                f"see {path / LOCK}, which rank 0 wrote"
            )
        time.sleep(0.2)


def check_start(path: Path, start: int, steps: int) -> None:
    """Raise ConfigError for a start beyond the run's last step, or at 0 in a folder that has lost its checkpoints.

    A run that ended before its first checkpoint was due has lost none: it starts again, as a new wandb run.
    """
    if start > steps:
        raise ConfigError(f"optim.steps={steps} is less than the {start} steps that {path} has done")
    records = metrics.read(path / metrics.FILE)
    done = max((record["step"] for record in records), default=0)
    if start > 0 or done == 0:
        return
    if _was_due(path, done, sum(record.get("seconds", 0.0) for record in records if record["step"] < done)):
        raise ConfigError(
            f"{path} has {done} steps and no checkpoint to resume from: resume=never starts again in a new folder"
        )
    print(f"{path} has {done} steps and no checkpoint, since none was due before: starts again at step 0")
    (path / metrics.WANDB_ID).unlink(missing_ok=True)


def _new(output_dir: Path, name: str) -> Path:
    """A folder that no other process has: mkdir succeeds for one only."""
    for number in itertools.count(1):
        path = output_dir / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError


def _newest_or_first(output_dir: Path, name: str) -> Path:
    while True:
        if (path := _newest(output_dir, name)) is not None:
            return path
        try:
            (output_dir / name).mkdir()
        except FileExistsError:
            if not (output_dir / name).is_dir():
                raise ConfigError(
                    f"{output_dir / name} is not a folder, but name={name} would be trained there"
                ) from None


def _newest(output_dir: Path, name: str) -> Path | None:
    """The newest folder of this name that has steps, or else the newest; None if there is none."""
    found = {}
    for path in output_dir.iterdir():
        match = re.fullmatch(rf"{re.escape(name)}(?:-([2-9]|[1-9][0-9]+))?", path.name)
        if match and _dangles(path):
            raise ConfigError(
                f"resume=auto: {path} links to {path.readlink()}, which does not exist, so the newest run of "
                f"name={name} is not known: restore that folder, or delete the link"
            )
        if match and path.is_dir() and (match[1] is None or _settings_of(path).get("name") != path.name):
            found[int(match[1] or 1)] = path
    begun = [number for number in sorted(found) if _has_begun(found[number])]
    if not found:
        return None
    number = (begun or sorted(found))[-1]
    if number > 1 and _settings_of(found[number]).get("name") != name:
        raise ConfigError(
            f"resume=auto: {found[number] / 'config.yaml'} names no run, so this may be one of name={name} or of "
            f"name={found[number].name}: to resume it, set name={found[number].name}"
        )
    return found[number]


def _was_due(path: Path, done: int, seconds: float) -> bool:
    """Whether a checkpoint was due before the last of `done` steps; true if the configuration does not tell.

    seconds: of the steps before the last.
    """
    checkpoint = _settings_of(path).get("checkpoint")
    found = checkpoint if isinstance(checkpoint, dict) else {}
    every, minutes = (found.get(name) or math.inf for name in ("every", "every_minutes"))
    return done > every or seconds >= 60 * minutes or every == minutes == math.inf


def _settings_of(path: Path) -> dict[str, Any]:
    """A run's configuration; empty if it cannot be read."""
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _dangles(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _has_begun(path: Path) -> bool:
    checkpoints = path / "checkpoints"
    return bool(metrics.read(path / metrics.FILE)) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _locked(path: Path) -> TextIO:
    """The lock file, open and locked. If the process that holds it is ending, this waits for the end."""
    file = (path / LOCK).open("a+")
    until = time.monotonic() + ENDING
    while not _lock(file, path):
        if time.monotonic() > until:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(f"{path} is in use by {holder}: wait until it ends, or give this run another name=...")
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _lock(file: TextIO, path: Path) -> bool:
    """Try to take the lock. False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        message = f"ringflash: {path} cannot be locked ({error.strerror}): a second run could use it at the same time"
        print(message, file=sys.stderr, flush=True)
    return True
