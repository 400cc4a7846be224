"""Checkpoints that are whole or not there: written aside, listed with their digests, then renamed.

    runs/NAME/checkpoints/step-00000100/state/           DeepSpeed's files: weights, optimizer, schedule, by rank
                          step-00000100/manifest.json    the size and SHA-256 of every file, written last
                          step-00000200.partial/         one being written, or what a killed run left
                          step-00000150.unsound/         one whose files were not what was written, moved aside

A run resumes from the newest checkpoint whose files are what its manifest says; older sound ones stand behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch.distributed as dist

from ringflash.errors import ConfigError
from ringflash.training.divergence import check_weights
from ringflash.training.world import World

STATE = "state"
MANIFEST = "manifest.json"
POSITIONS = "document"  # where positions begin; in checkpoints that do not tell, with the sequence
PARTIAL, UNSOUND = ".partial", ".unsound"
# Settings that a resumed run may change. The others are part of the state: the run would not be the one that stopped.
FREE = (
    "name", "runs", "resume", "checkpoint.", "evaluation.", "logger.", "data.cache", "memory.loss_tile",
    "memory.recompute", "model.kernel", "model.deterministic", "model.compensated", "model.extrapolate_positions",
    "optim.steps", "parallel.",
)  # fmt: skip


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = 100
    """Steps between checkpoints; 0: only at the end."""

    keep: int = 2
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise ConfigError(f"checkpoint.every={self.every} must be 0 or more, checkpoint.keep={self.keep} 1 or more")


def save(
    engine: deepspeed.DeepSpeedEngine, folder: Path, step: int, world: World, keep: int, settings: dict | None = None
) -> Path:
    """Write the state after `step` steps under `folder`; all ranks call it. Returns the checkpoint's path.

    keep: how many stay, this one included; settings: the run's, nested, which a resumed run must share. Raises
    DivergedError, and leaves the earlier checkpoints, where a weight is not finite.
    """
    path = folder / f"step-{step:08d}"
    check_weights(engine, world, path)
    aside = path.with_name(path.name + PARTIAL)
    with world.own_pace(f"deleting what is left of {aside}"):
        if world.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    with world.own_pace(f"writing {path}"):
        engine.save_checkpoint(str(aside), tag=STATE, save_latest=False)
    with world.own_pace(f"reading {path} for its digests"):
        digests = _digests(aside, _share(aside, world))
    files = _gathered(digests, world)
    with world.own_pace(f"renaming {path} into place, and deleting older checkpoints"):
        if world.is_first:
            manifest = {
                "step": step,
                **_grid(world),
                "positions": POSITIONS,
                "settings": _bound(settings or {}),
                "files": files,
            }
            _write_durably(aside / MANIFEST, json.dumps(manifest, indent=1))
            shutil.rmtree(path, ignore_errors=True)
            os.rename(aside, path)
            for old in [other for other in _written(folder) if other != path][keep - 1 :]:
                shutil.rmtree(old)
    return path


def resume(
    engine: deepspeed.DeepSpeedEngine, folder: Path, world: World, settings: dict | None = None, say=print
) -> int:
    """Load the newest sound checkpoint under `folder`, and return its step; 0 where there is no checkpoint.

    Unsound ones are moved aside, and rank 0 says which and why. Raises ConfigError where none of several is sound, for
    a checkpoint of another number of ranks (its optimizer shards fit no other), and for one of other settings.
    """
    written = world.share(_written(folder))
    for path in written:
        with world.own_pace(f"reading {path} for its digests"):
            fault = _fault(path, world)
        if fault is not None:
            if world.is_first:
                say(f"{path} is not sound ({fault}); going back to the one before")
                os.rename(path, path.with_name(path.name + UNSOUND))
            continue
        manifest = json.loads((path / MANIFEST).read_text())
        if "ulysses" not in manifest:
            raise ConfigError(f"{path} was written by an earlier version of ringflash; resume=never starts anew")
        if (before := manifest.get("positions", "sequence")) != POSITIONS:
            raise ConfigError(
                f"{path} counts positions within each {before}, this version of ringflash within each {POSITIONS}: "
                f"resume with the version that wrote it, or start anew from its exported weights (model.path)"
            )
        for name, now in _grid(world).items():
            if manifest[name] != now:
                raise ConfigError(
                    f"{path} was written with {name}={manifest[name]}, this run has {name}={now}: resume with as "
                    f"many, or start anew from its exported weights (model.path)"
                )
        _check_settings(path, manifest["settings"], _bound(settings or {}))
        with world.own_pace(f"loading {path}"):
            engine.load_checkpoint(str(path), tag=STATE)
        if world.is_first:
            say(f"resumed from {path}")
        return manifest["step"]
    if written:
        raise ConfigError(f"{folder} holds {len(written)} checkpoints and none is sound; resume=never starts anew")
    return 0


def _grid(world: World) -> dict[str, int]:
    """How the ranks are divided, however that was asked for."""
    return {"ranks": world.size, "ring": world.ring.size, "ulysses": world.size // world.replicas // world.ring.size}


def _check_settings(path: Path, before: dict, now: dict) -> None:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            name = "the text of data.path, by its digest" if key == "data.digest" else key
            raise ConfigError(
                f"{name}={now.get(key)} differs from {before.get(key)}, with which {path} was written: resume with the "
                f"same, or start anew (resume=never)"
            )


def _bound(settings: dict, prefix: str = "") -> dict:
    """The settings that a resumed run must share, by dotted key."""
    bound = {}
    for name, value in settings.items():
        key = prefix + name
        if isinstance(value, dict):
            bound.update(_bound(value, f"{key}."))
        elif not key.startswith(FREE):
            bound[key] = value
    return bound


def _written(folder: Path) -> list[Path]:
    """Checkpoints that were renamed into place, newest first; what was left half-written is not among them."""
    return sorted((p for p in folder.glob("step-*") if not p.name.endswith((PARTIAL, UNSOUND))), reverse=True)


def _fault(path: Path, world: World) -> str | None:
    """The first thing wrong with a checkpoint, the same on every rank; each rank reads its share of the files."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST}: {type(error).__name__}"
    faults = {}
    for name in sorted(files)[world.rank :: world.size]:
        size, digest = files[name]
        if not (path / name).is_file():
            faults[name] = "is missing"
        elif (path / name).stat().st_size != size:
            faults[name] = f"has {(path / name).stat().st_size} of {size} bytes"
        elif _digest(path / name) != digest:
            faults[name] = "has other contents than were written"
    for name, fault in sorted(_gathered(faults, world).items()):
        return f"{name} {fault}"
    return None


def _share(folder: Path, world: World) -> list[Path]:
    """The files that this rank reads for all."""
    return sorted(p for p in folder.rglob("*") if p.is_file())[world.rank :: world.size]


def _digests(folder: Path, files: list[Path]) -> dict[str, tuple[int, str]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, _digest(p)) for p in files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gathered(mine: dict, world: World) -> dict:
    """Every rank's dict in one, on every rank."""
    parts: list[dict] = [{}] * world.size
    dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
