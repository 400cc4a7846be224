"""Files of a run: they are complete or absent, and errors name the file that cannot be written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ringflash.errors import DiskError, in_one_line

DISK_MESSAGES = ("inline_container", "PytorchStreamWriter", "PyTorchFileWriter", "os error", "I/O error")
CONFIG = "config.json"  # in a model's folder
BLOCK = 1 << 20  # bytes at each end of a weights file that its digest covers


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: at any time, either the old file or the new one exists. Text is written as UTF-8."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


def write_figure(path: Path, figure: Any) -> None:
    """Write matplotlib's figure as a PNG, atomically."""
    aside = path.with_name(f".{path.name}")
    with writing(path):
        figure.savefig(aside, format="png", dpi=120)
        os.replace(aside, path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context that turns disk errors of any library into a DiskError with `path` and the free space."""
    try:
        yield
    except Exception as error:
        if not _is_disk_error(error):
            raise
        folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(folder).free / 2**30
        # If torch writes through a Python file, the system's error is the context of torch's.
        known = error.__context__ if isinstance(error.__context__, OSError) else error
        raise DiskError(f"{path} was not written: {in_one_line(known)}; {free:.3g} GiB are free on its disk") from error


def _is_disk_error(error: Exception) -> bool:
    """Whether the disk is the cause. torch and safetensors raise their own errors, without an error number."""
    if isinstance(error, OSError):
        return not isinstance(error, (ConnectionError, TimeoutError))
    return any(part in str(error) for part in DISK_MESSAGES)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder; it may be missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(aside: Path, folder: Path) -> None:
    """Replace `folder` by `aside`, and give its files the folder's permissions to read and write.

    safetensors creates files that only their owner can read, whatever the umask.
    """
    mode = aside.stat().st_mode & 0o666
    for file in aside.iterdir():
        file.chmod(mode)
    remove(folder)
    os.rename(aside, folder)


def digest(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model or an adapter."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))


def model_digest(folder: Path, config: str = CONFIG) -> str:
    """A digest of a model folder's `config`, and of the names, sizes, first and last bytes of its weight files."""
    found = hashlib.sha256((folder / config).read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            found.update(file.read(BLOCK))
            file.seek(max(0, size - BLOCK))
            found.update(file.read(BLOCK))
    return found.hexdigest()
