"""Scratch folders: where a cache is written before it is renamed, and what deletes those that killed runs left.

    <cache>/<name>.unfinished-<host>-<random>/    locked by its builder as long as that lives

The kernel releases the lock of a killed process, so a folder of this host whose lock is free is abandoned. Folders of
other hosts are left alone: some shared file systems lock within one host only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_folder(cache: Path, name: str) -> Iterator[Path]:
    """A folder in `cache`, deleted after use. Abandoned ones are deleted first."""
    cache.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    with contextlib.ExitStack() as held:
        with _locked(cache, wait=True):  # so that no builder finds the new folder before it is locked
            _delete_abandoned(cache, host)
            made = tempfile.TemporaryDirectory(
                dir=cache, prefix=f"{name}.unfinished-{host}-", ignore_cleanup_errors=True
            )
            folder = Path(held.enter_context(made))
            held.enter_context(_locked(folder, wait=True))
        yield folder


def _delete_abandoned(cache: Path, host: str) -> None:
    for folder in cache.glob(f"*.unfinished-{host}-*"):
        with contextlib.suppress(FileNotFoundError), _locked(folder, wait=False) as locked:
            if locked:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Holds a folder's lock; False if another holds it (without `wait`), or the file system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
