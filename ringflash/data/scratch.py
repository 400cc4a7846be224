"""Scratch folders, in which a cache is written before it is renamed, and the deletion of those left by killed runs.

    <cache>/<name>.unfinished-<host>-<random>/    locked by its builder as long as that lives

A folder is kept when its builder is stopped, and deleted when it is done or its input is refused. The kernel releases
the lock of a killed process, so a folder of this host whose lock is free is abandoned. It is deleted when the next
builder of its name has taken it over, or after a week. Folders of other hosts are left alone: some shared file systems
lock within one host only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ringflash.errors import ConfigError

KEPT = 7 * 24 * 3600.0  # seconds that an abandoned folder of another name is kept


@contextlib.contextmanager
def scratch_folder(cache: Path, name: str) -> Iterator[Path]:
    """A locked folder in `cache`. It is deleted after use, but kept for the next builder after an interruption."""
    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with locked(cache, wait=True):  # so that no builder finds the new folder before it is locked
            folder = Path(tempfile.mkdtemp(dir=cache, prefix=_prefix(name)))
            held.enter_context(locked(folder, wait=True))
        try:
            yield folder
        except ConfigError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def others(folder: Path, name: str) -> list[Path]:
    """The other folders of that name beside `folder`, of every host."""
    return [other for other in folder.parent.glob(f"{name}.unfinished-*") if other != folder]


def delete_abandoned(folder: Path, name: str) -> None:
    """Delete the abandoned folders beside `folder`: those of `name`, and old ones."""
    with locked(folder.parent, wait=True):
        for other in folder.parent.glob(f"{_prefix('*')}*"):
            with contextlib.suppress(FileNotFoundError), locked(other, wait=False) as free:
                old = time.time() - max(x.stat().st_mtime for x in [other, *other.rglob("*")]) > KEPT
                if free and (old or other.name.startswith(_prefix(name))):
                    shutil.rmtree(other, ignore_errors=True)


def _prefix(name: str) -> str:
    return f"{name}.unfinished-{socket.gethostname()}-"


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds the lock of a file or folder; False if another holds it (without `wait`), or there are no locks here."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks only what is open for writing
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
