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
import itertools
import json
import math
import os
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from ringflash.errors import ConfigError
from ringflash.models.lora import adapted
from ringflash.training import reshard
from ringflash.training.divergence import check_weights
from ringflash.training.files import digest, remove, write_atomically, writing
from ringflash.training.optimizers.host_adamw import HostAdamW
from ringflash.training.world import World

STATE = "state"
MANIFEST = "manifest.json"
POSITIONS = "document"  # where positions begin; in manifests without this entry, with the sequence
PARTIAL, CORRUPT = ".partial", ".corrupt"
# Settings that a resumed run may change. With another value of any other setting it would be a different run.
FREE = (
    "name", "output_dir", "resume", "checkpoint.", "evaluation.", "logger.", "data.cache", "memory.loss_tile",
    "memory.mlp_tile", "memory.recompute", "memory.attention_results", "memory.layer_inputs",
    "attention.", "fused.", "model.extrapolate_positions",
    "optim.steps", "optim.epochs", "parallel.",
    # Compared by content, as data.digest and model.digest.
    "data.path", "data.files", "data.field", "data.format", "data.sources", "data.evaluation", "data.tokenizer",
    "model.path", "model.lora.path", "model.lora.merge",
)  # fmt: skip
# Settings that it may change too, which is reported: `train_step` sets the learning rate of each step, and fewer ranks
# may need larger micro-batches. The optimizer's others, clip and weight_decay among them, are restored from the
# checkpoint.
REPORTED = ("optim.lr", "optim.warmup", "optim.final_lr", "optim.schedule", "optim.decay", "optim.micro_batch")
SHARDING = ("zero", "optimizer_states")  # of memory: which states are in a rank's files
LORA = ("model.lora.rank", "model.lora.digest")  # without which a run has no others of model.lora
TOKENIZER = "tokenizer.digest"  # says why other tokens are; one that gives the same tokens is not refused
BY_DIGEST = {
    "data.digest": "the tokens of data.path or data.sources, by their digest",
    "model.digest": "the model of model.path, by its digest",
    "model.lora.digest": "the adapter of model.lora.path, by its digest",
    TOKENIZER: "data.tokenizer, by its digest",
}


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
        return bool(self.world.max(torch.tensor(float(passed), device=self.world.device)).item())


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
    for path in _written(folder) if world.is_first else ():
        match _read_manifest(path)[0].get("best"):
            case {"of": str(found), "step": int(step), "loss": float(loss), "evaluations": int(evaluations)}:
                if found == of and _path(folder, step).is_dir():
                    best = Best(of, step, loss, evaluations)
                    break
    return world.broadcast(best)


def load_best(engine: deepspeed.DeepSpeedEngine, folder: Path, best: Best, world: World) -> None:
    """Load the checkpoint of the lowest held-out loss. Raises ConfigError if it is corrupt."""
    path = _path(folder, best.step)
    with world.without_timeout(f"loading {path}"):
        manifest, fault = world.broadcast(_read_manifest(path))
        fault = fault or _damage(path, manifest["files"], world)
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
    path = _path(folder, step)
    check_weights(engine, world, path)
    aside = path.with_name(path.name + PARTIAL)
    with world.without_timeout(f"deleting half-written checkpoints of killed runs in {folder}"):
        if world.is_first:
            with writing(aside):
                for left in _half_written(folder):
                    remove(left)
                aside.mkdir(parents=True)
    with world.without_timeout(f"writing {path}"), writing(aside):
        frozen = bool(adapted(engine.module))  # the model's own weights, which are those of model.path
        engine.save_checkpoint(str(aside), tag=STATE, save_latest=False, exclude_frozen_parameters=frozen)
        if isinstance(engine.basic_optimizer, HostAdamW):
            engine.basic_optimizer.save(aside / STATE, world.rank)
    with world.without_timeout(f"reading {path} for its digests"):
        digests = _digests(aside, _files_to_read(aside, world))
    files = _all_gathered(digests, world)
    with world.without_timeout(f"renaming {path} into place, and deleting older checkpoints"):
        if world.is_first:
            manifest = {
                "step": step,
                **_grid(world),
                "positions": POSITIONS,
                "settings": _bound(settings or {}),
                "files": files,
            }
            if best is not None and best.step:
                manifest["best"] = asdict(best)
            write_atomically(aside / MANIFEST, json.dumps(manifest, indent=1))
            remove(path)
            os.rename(aside, path)
            kept = None if best is None else _path(folder, best.step)
            for old in [other for other in _written(folder) if other != path][keep - 1 :]:
                if old != kept:
                    remove(old)
    return path


def resume(
    engine: deepspeed.DeepSpeedEngine, folder: Path, world: World, settings: dict | None = None, log=print
) -> int:
    """Load the newest intact checkpoint under `folder`, and return its step; 0 if there is no checkpoint.

    Once it is loaded, newer ones, which are corrupt, are moved aside, and rank 0 reports which and why. Raises
    ConfigError and changes nothing if none is intact, or if it has other settings.
    """
    intact, faults = _newest_intact(folder, world)
    if intact is None:
        if world.broadcast(faults or _moved_aside(folder)):
            fault = next(iter(faults.values()), "moved aside before")
            raise ConfigError(
                f"{folder} holds checkpoints, and none is intact ({fault}): resume=never starts again in a new folder"
            )
        return 0
    path, manifest = intact
    changes = _check_fits(path, manifest, world, settings or {})
    with world.without_timeout(f"loading {path}"):
        _load(engine, path, manifest, world)
    if world.is_first:
        for corrupt, fault in faults.items():
            log(f"{corrupt} is corrupt ({fault}); trying the checkpoint before it")
            os.rename(corrupt, _aside(corrupt))
        log("; ".join([f"resumed from {path}", *changes]))
    return manifest["step"]


def _newest_intact(folder: Path, world: World) -> tuple[tuple[Path, dict[str, Any]] | None, dict[Path, str]]:
    """The newest intact checkpoint with its manifest, and the fault of each newer one."""
    faults: dict[Path, str] = {}
    for path in world.broadcast(_written(folder)):
        with world.without_timeout(f"reading {path} for its digests"):
            manifest, fault = world.broadcast(_read_manifest(path))
            if fault is None:
                fault = _damage(path, manifest["files"], world)
        if fault is None:
            return (path, manifest), faults
        faults[path] = fault
    return None, faults


def _load(engine: deepspeed.DeepSpeedEngine, path: Path, manifest: dict[str, Any], world: World) -> None:
    """Load the files of an intact checkpoint."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # on every rank, DeepSpeed prints the name of a variable
            loaded = _load_state(engine, path, manifest, world)
    except Exception as error:
        raise RuntimeError(
            f"{path} has the digests that were written, but DeepSpeed cannot load it: {error}"
        ) from error
    if not loaded:
        raise RuntimeError(f"{path} has its digests, but DeepSpeed finds nothing to load in it")


def _load_state(engine: deepspeed.DeepSpeedEngine, path: Path, manifest: dict[str, Any], world: World) -> bool:
    """Load this rank's state. Returns whether there was one."""
    if engine.zero_optimization() and not _is_sharded_alike(manifest, engine, world):
        reshard.load(engine, path / STATE, manifest["ranks"], world)
        return True
    loaded, _ = engine.load_checkpoint(str(path), tag=STATE, load_module_strict=not adapted(engine.module))
    if isinstance(engine.basic_optimizer, HostAdamW):
        engine.basic_optimizer.load(path / STATE, world.rank)
    return loaded is not None


def _is_sharded_alike(manifest: dict[str, Any], engine: deepspeed.DeepSpeedEngine, world: World) -> bool:
    """Whether each rank of this run finds its states in the files of the rank of that number."""
    before, memory = manifest["settings"], asdict(engine.module.memory)
    return manifest["ranks"] == world.size and all(before.get(f"memory.{x}", memory[x]) == memory[x] for x in SHARDING)


def _check_fits(path: Path, manifest: dict[str, Any], world: World, settings: dict) -> list[str]:
    """The changes that are reported, in words. ConfigError for a checkpoint of other settings or versions."""
    if "ulysses" not in manifest:
        raise ConfigError(
            f"{path} was written by an earlier version of ringflash: resume=never starts again in a new folder"
        )
    if (before := manifest.get("positions", "sequence")) != POSITIONS:
        raise ConfigError(
            f"{path} counts positions within each {before}, this version of ringflash within each {POSITIONS}: "
            f"resume with the version that wrote it, or start again from its exported weights (model.path)"
        )
    moved = [f"{name}={now} replaces {manifest[name]}" for name, now in _grid(world).items() if manifest[name] != now]
    return moved + _check_settings(path, _bound(manifest["settings"]), _bound(settings))


def _grid(world: World) -> dict[str, int]:
    """The grid of ranks, whichever settings led to it."""
    return {"ranks": world.size, "ring": world.ring.size, "ulysses": world.size // world.replicas // world.ring.size}


def _check_settings(path: Path, before: dict, now: dict) -> list[str]:
    changes = []
    for key in sorted((before.keys() | now.keys()) - {TOKENIZER}, key=lambda key: (key not in LORA, key)):
        if before.get(key) != now.get(key):
            if key == "data.digest" and before.get(TOKENIZER) not in (None, now.get(TOKENIZER)):
                key = TOKENIZER
            if key in before and _may_change(key, (before[key], now.get(key))):
                changes.append(f"{key}={now.get(key)} replaces {before[key]}")
                continue
            name = BY_DIGEST.get(key, key)
            raise ConfigError(
                f"{name}={now.get(key)} differs from {before.get(key)}, with which {path} was written: resume with "
                f"that value, or start again (resume=never)"
            )
    return changes


def _may_change(key: str, values: tuple[Any, Any]) -> bool:
    """Whether a resumed run may change a setting, which is reported, from the first of the values to the second."""
    if key == "memory.zero":
        return 0 not in values  # without ZeRO, all ranks have all states, in one file
    if key == "memory.optimizer_states":
        return "bf16" not in values  # which have other bits of the weights and rounded moments
    return key in REPORTED


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
    """Checkpoints that were renamed into place, newest first; half-written ones are not among them."""
    found = {path: _step_of(path) for path in (folder.iterdir() if folder.is_dir() else ())}
    return sorted((p for p, step in found.items() if step is not None), key=lambda p: found[p] or 0, reverse=True)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None for other names."""
    step = path.name.removeprefix("step-")
    return int(step) if re.fullmatch(r"[0-9]+", step) and path.name == f"step-{int(step):08d}" else None


def _moved_aside(folder: Path) -> bool:
    """Whether an earlier run moved checkpoints aside."""
    return folder.is_dir() and any(re.fullmatch(rf"step-[0-9]+{CORRUPT}(-[0-9]+)?", p.name) for p in folder.iterdir())


def _half_written(folder: Path) -> list[Path]:
    """Half-written checkpoints of killed runs, of any step."""
    found = folder.iterdir() if folder.is_dir() else ()
    return [p for p in found if p.name.endswith(PARTIAL) and _step_of(p.with_suffix("")) is not None]


def _aside(path: Path) -> Path:
    """The first free name for a corrupt checkpoint."""
    names = (f"{path.name}{CORRUPT}{'' if number == 1 else f'-{number}'}" for number in itertools.count(1))
    return next(p for p in map(path.with_name, names) if not os.path.lexists(p))


def _read_manifest(path: Path) -> tuple[dict[str, Any], str | None]:
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
    ranks = (manifest.get("ranks"), manifest.get("ring"), manifest.get("ulysses", 1))  # an earlier version had none
    if any(type(number) is not int for number in ranks):
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


def _damage(path: Path, files: dict[str, tuple[int, str]], world: World) -> str | None:
    """The first fault of a checkpoint's files, the same on every rank; the ranks divide the reading."""
    faults = {}
    for name in sorted(files)[world.rank :: world.size]:
        if (fault := _fault(path / name, *files[name])) is not None:
            faults[name] = fault
    return next((f"{name} {fault}" for name, fault in sorted(_all_gathered(faults, world).items())), None)


def _fault(path: Path, size: int, expected: str) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != size:
            return f"has {path.stat().st_size} of {size} bytes"
        return None if digest(path) == expected else "has another digest than was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _files_to_read(folder: Path, world: World) -> list[Path]:
    """The files whose digests this rank computes, for all ranks."""
    return sorted(p for p in folder.rglob("*") if p.is_file())[world.rank :: world.size]


def _digests(folder: Path, files: list[Path]) -> dict[str, tuple[int, str]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, digest(p)) for p in files}


def _all_gathered(mine: dict, world: World) -> dict:
    """The union of all ranks' dicts, on every rank."""
    if world.size == 1:
        return mine
    parts: list[dict] = [{}] * world.size
    dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}
