"""Checkpoints are complete or absent: they are written to another folder, listed with digests, and renamed.

    runs/NAME/checkpoints/step-00000100/state/           DeepSpeed's files: weights that are trained, optimizer, by rank
                          step-00000100/manifest.json    the size and SHA-256 of every file, written last
                          step-00000200.partial/         one being written, or left by a killed run
                          step-00000150.corrupt/         one whose files differ from what was written, moved aside

A run resumes from the newest intact checkpoint, whose files are those in its manifest. If the newest is corrupt, an
older one is used. Folders with any other name belong to the user and are not touched.

With checkpoint.keep_best, the checkpoint of the lowest held-out loss is kept as well. Manifests have that loss.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed

from ringflash.distributed.world import World
from ringflash.errors import ConfigError
from ringflash.files import remove, write_atomically, writing
from ringflash.models.freezing import has_frozen
from ringflash.training.checkpoints import reshard
from ringflash.training.checkpoints.compatibility import POSITIONS, check_fits, grid, settings_to_match
from ringflash.training.checkpoints.manifest import (
    MANIFEST,
    PARTIAL,
    STATE,
    all_gathered,
    checkpoint_path,
    corrupt_name,
    digests_of,
    files_fault,
    half_written,
    moved_aside,
    read_manifest,
    written,
)
from ringflash.training.divergence import check_weights
from ringflash.training.optimizers.host_adamw import HostAdamW

SHARDING = ("zero", "optimizer_states")  # of memory: which states are in a rank's files


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: int = 100
    """Steps between checkpoints; 0: none by steps. The last step always has one."""

    every_minutes: float = 0.0
    """Minutes after which a step also writes a checkpoint, since the last one; 0: none by time."""

    keep: int = 2
    """Number of checkpoints to keep. Older ones are deleted."""

    keep_best: bool = False
    """Also write and keep the checkpoint of the evaluation with the lowest held-out loss, and export its weights
    instead of the last."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise ConfigError(f"checkpoint.every={self.every} must be 0 or more, checkpoint.keep={self.keep} 1 or more")
        if not 0 <= self.every_minutes < math.inf:
            raise ConfigError(f"checkpoint.every_minutes={self.every_minutes} must be 0 or more and finite")


class Timer:
    """Measures checkpoint.every_minutes on rank 0's clock. All ranks call it alike."""

    def __init__(self, minutes: float, world: World) -> None:
        self.minutes, self.world = minutes, world
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self.since = time.monotonic()

    def due(self) -> bool:
        """Whether the minutes have passed, the same on all ranks."""
        if not self.minutes:
            return False
        passed = self.world.is_first and time.monotonic() - self.since >= 60 * self.minutes
        return self.world.any(passed)


@dataclass(frozen=True)
class Best:
    """The lowest held-out loss of a run so far, and the step after which it was measured; 0 before there is one.

    of: what it was evaluated on. Losses of other evaluations are not compared with it. evaluations: how many followed
    and did not lower it.
    """

    of: str
    step: int = 0
    loss: float = math.inf
    evaluations: int = 0

    def after(self, step: int, loss: float) -> Best:
        """The lowest, of this one and that of a later step."""
        return Best(self.of, step, loss) if loss < self.loss else replace(self, evaluations=self.evaluations + 1)


def find_best(folder: Path, of: str, world: World) -> Best:
    """The lowest held-out loss in the newest manifest under `folder` that has one, and whose checkpoint is there."""
    best = Best(of)
    for path in written(folder) if world.is_first else ():
        match read_manifest(path)[0].get("best"):
            case {"of": str(found), "step": int(step), "loss": float(loss), "evaluations": int(evaluations)}:
                if found == of and checkpoint_path(folder, step).is_dir():
                    best = Best(of, step, loss, evaluations)
                    break
    return world.broadcast(best)


def load_best(engine: deepspeed.DeepSpeedEngine, folder: Path, best: Best, world: World) -> None:
    """Load the checkpoint of the lowest held-out loss. Raises ConfigError if it is corrupt."""
    path = checkpoint_path(folder, best.step)
    with world.without_timeout(f"loading {path}"):
        manifest, fault = _read(path, world)
        if fault is not None:
            raise ConfigError(
                f"{path}, which has the lowest held-out loss, is corrupt ({fault}): resume=auto "
                f"checkpoint.keep_best=false evaluation.patience=null exports the last weights"
            )
        _load(engine, path, manifest, world)


def save(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    step: int,
    world: World,
    keep: int,
    settings: dict | None = None,
    best: Best | None = None,
) -> Path:
    """Write the state after `step` steps under `folder`; all ranks call it. Returns the checkpoint's path.

    keep: how many are kept, including this one. settings: the run's, nested; a resumed run must share them. best: whose
    checkpoint is kept, too. Raises DivergedError if a weight is not finite; the earlier checkpoints stay.
    """
    path = checkpoint_path(folder, step)
    check_weights(engine, world, path)
    aside = path.with_name(path.name + PARTIAL)
    with world.without_timeout(f"deleting half-written checkpoints of killed runs in {folder}"):
        if world.is_first:
            with writing(aside):
                for left in half_written(folder):
                    remove(left)
                aside.mkdir(parents=True)
    with world.without_timeout(f"writing {path}"), writing(aside):
        frozen = has_frozen(engine.module)  # weights that are as the run's model is built
        engine.save_checkpoint(str(aside), tag=STATE, save_latest=False, exclude_frozen_parameters=frozen)
        if isinstance(engine.basic_optimizer, HostAdamW):
            engine.basic_optimizer.save(aside / STATE, world.rank)
    with world.without_timeout(f"reading {path} for its digests"):
        digests = digests_of(aside, world)
    files = all_gathered(digests, world)
    with world.without_timeout(f"renaming {path} into place, and deleting older checkpoints"):
        if world.is_first:
            manifest = {
                "step": step,
                **grid(world),
                "positions": POSITIONS,
                "settings": settings_to_match(settings or {}),
                "files": files,
            }
            if best is not None and best.step:
                manifest["best"] = asdict(best)
            write_atomically(aside / MANIFEST, json.dumps(manifest, indent=1))
            remove(path)
            os.rename(aside, path)
            kept = None if best is None else checkpoint_path(folder, best.step)
            for old in [other for other in written(folder) if other != path][keep - 1 :]:
                if old != kept:
                    remove(old)
    return path


def resume(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    world: World,
    settings: dict | None = None,
    log: Callable[[str], None] = print,
) -> int:
    """Load the newest intact checkpoint under `folder`, and return its step; 0 if there is no checkpoint.

    Once it is loaded, newer ones, which are corrupt, are moved aside, and rank 0 reports which and why. Raises
    ConfigError and changes nothing if none is intact, or if it has other settings.
    """
    intact, faults = _newest_intact(folder, world)
    if intact is None:
        if world.broadcast(faults or moved_aside(folder)):
            fault = next(iter(faults.values()), "moved aside before")
            raise ConfigError(
                f"{folder} holds checkpoints, and none is intact ({fault}): resume=never starts again in a new folder"
            )
        return 0
    path, manifest = intact
    changes = check_fits(path, manifest, world, settings or {})
    with world.without_timeout(f"loading {path}"):
        _load(engine, path, manifest, world)
    if world.is_first:
        for corrupt, fault in faults.items():
            log(f"{corrupt} is corrupt ({fault}); trying the checkpoint before it")
            os.rename(corrupt, corrupt_name(corrupt))
        log("; ".join([f"resumed from {path}", *changes]))
    return manifest["step"]


def _newest_intact(folder: Path, world: World) -> tuple[tuple[Path, dict[str, Any]] | None, dict[Path, str]]:
    """The newest intact checkpoint with its manifest, and the fault of each newer one."""
    faults: dict[Path, str] = {}
    for path in world.broadcast(written(folder)):
        with world.without_timeout(f"reading {path} for its digests"):
            manifest, fault = _read(path, world)
        if fault is None:
            return (path, manifest), faults
        faults[path] = fault
    return None, faults


def _read(path: Path, world: World) -> tuple[dict[str, Any], str | None]:
    """The manifest of a checkpoint, and its first fault, or that of its files, or None."""
    manifest, fault = world.broadcast(read_manifest(path))
    return manifest, fault or files_fault(path, manifest["files"], world)


def _load(engine: deepspeed.DeepSpeedEngine, path: Path, manifest: dict[str, Any], world: World) -> None:
    """Load this rank's state from the files of an intact checkpoint."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # on every rank, DeepSpeed prints the name of a variable
            if engine.zero_optimization() and not _is_sharded_alike(manifest, engine, world):
                reshard.load(engine, path / STATE, manifest["ranks"], world)
                return
            loaded, _ = engine.load_checkpoint(str(path), tag=STATE, load_module_strict=not has_frozen(engine.module))
            if isinstance(engine.basic_optimizer, HostAdamW):
                engine.basic_optimizer.load(path / STATE, world.rank)
    except Exception as error:
        raise RuntimeError(
            f"{path} has the digests that were written, but DeepSpeed cannot load it: {error}"
        ) from error
    if loaded is None:
        raise RuntimeError(f"{path} has its digests, but DeepSpeed finds nothing to load in it")


def _is_sharded_alike(manifest: dict[str, Any], engine: deepspeed.DeepSpeedEngine, world: World) -> bool:
    """Whether each rank of this run finds its states in the files of the rank of that number."""
    before, memory = manifest["settings"], asdict(engine.module.memory)
    return manifest["ranks"] == world.size and all(before.get(f"memory.{x}", memory[x]) == memory[x] for x in SHARDING)
