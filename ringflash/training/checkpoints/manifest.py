"""Manifests: which checkpoints a folder holds, and whether their files are as they were written.

A manifest lists the size and SHA-256 of every file of its checkpoint and is written last. The ranks divide the reading.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist

from ringflash.distributed.world import World
from ringflash.files import digest

STATE = "state"
MANIFEST = "manifest.json"
PARTIAL, CORRUPT = ".partial", ".corrupt"


def written(folder: Path) -> list[Path]:
    """Checkpoints that were renamed into place, newest first; half-written ones are not among them."""
    found = {path: _step_of(path) for path in (folder.iterdir() if folder.is_dir() else ())}
    return sorted((p for p, step in found.items() if step is not None), key=lambda p: found[p] or 0, reverse=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return folder / f"step-{step:08d}"


def _step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None for other names."""
    step = path.name.removeprefix("step-")
    return int(step) if re.fullmatch(r"[0-9]+", step) and path.name == f"step-{int(step):08d}" else None


def moved_aside(folder: Path) -> bool:
    """Whether an earlier run moved checkpoints aside."""
    return folder.is_dir() and any(re.fullmatch(rf"step-[0-9]+{CORRUPT}(-[0-9]+)?", p.name) for p in folder.iterdir())


def half_written(folder: Path) -> list[Path]:
    """Half-written checkpoints of killed runs, of any step."""
    found = folder.iterdir() if folder.is_dir() else ()
    return [p for p in found if p.name.endswith(PARTIAL) and _step_of(p.with_suffix("")) is not None]


def corrupt_name(path: Path) -> Path:
    """The first free name for a corrupt checkpoint."""
    names = (f"{path.name}{CORRUPT}{'' if number == 1 else f'-{number}'}" for number in itertools.count(1))
    return next(p for p in map(path.with_name, names) if not os.path.lexists(p))


def read_manifest(path: Path) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's manifest, and its first fault or None."""
    if (path / MANIFEST).exists() and not (path / MANIFEST).is_file():
        return {}, f"{MANIFEST} is not a file"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{MANIFEST}: {type(error).__name__}"
    if not isinstance(manifest, dict):
        return {}, f"{MANIFEST} holds a {type(manifest).__name__}"
    step = manifest.get("step")
    if type(step) is not int or step != _step_of(path):
        return {}, f"{MANIFEST} is of step {step!r:.40}"
    if any(type(manifest.get(name)) is not int for name in ("ranks", "ring", "ulysses")):
        return {}, f"{MANIFEST} has no number of ranks that wrote it"
    files, settings = manifest.get("files"), manifest.get("settings")
    if not isinstance(settings, dict) or not isinstance(files, dict) or not files:
        return {}, f"{MANIFEST} lists no files or no settings"
    wrong = next((name for name, entry in files.items() if not _is_entry(name, entry)), None)
    if wrong is not None:
        return {}, f"{MANIFEST} has no size and digest of {wrong!r:.200} in its folder"
    there = (str(p.relative_to(path)) for p in (path / STATE).rglob("*") if p.is_file())
    unlisted = next((name for name in sorted(there) if name not in files), None)  # DeepSpeed would read it as well
    return manifest, None if unlisted is None else f"{MANIFEST} does not list {unlisted}"


def _is_entry(name: str, entry: Any) -> bool:
    inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    match entry:
        case [int(), str()]:
            return inside and name.isprintable()
    return False


def files_fault(path: Path, files: dict[str, tuple[int, str]], world: World) -> str | None:
    """The first fault of a checkpoint's files, the same on every rank; the ranks divide the reading."""
    faults = {}
    for name in sorted(files)[world.rank :: world.size]:
        if (fault := _fault(path / name, *files[name])) is not None:
            faults[name] = fault
    return next((f"{name} {fault}" for name, fault in sorted(all_gathered(faults, world).items())), None)


def _fault(path: Path, size: int, expected: str) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != size:
            return f"has {path.stat().st_size} of {size} bytes"
        return None if digest(path) == expected else "has another digest than was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def digests_of(folder: Path, world: World) -> dict[str, tuple[int, str]]:
    """The size and digest of this rank's share of the files, by their names in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())[world.rank :: world.size]
    return {str(p.relative_to(folder)): (p.stat().st_size, digest(p)) for p in files}


def all_gathered(mine: dict, world: World) -> dict:
    """The union of all ranks' dicts, on every rank."""
    if world.size == 1:
        return mine
    parts: list[dict] = [{}] * world.size
    dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}
