"""Compatibility: which settings may differ between a checkpoint and the run that resumes from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ringflash.distributed.world import World
from ringflash.errors import ConfigError, shown

POSITIONS = "document"  # where positions begin; in manifests without this entry, with the sequence
# Settings that a resumed run may change. With another value of any other setting it would be a different run.
FREE = (
    "name", "output_dir", "resume", "checkpoint.", "evaluation.", "logger.", "data.cache", "memory.loss_tile",
    "memory.mlp_tile", "memory.recompute", "memory.attention_results", "memory.layer_inputs",
    "attention.", "fused.", "model.extrapolate_positions", "parallel.",
    # Compared by content, as data.digest and model.digest.
    "data.path", "data.files", "data.field", "data.columns", "data.format", "data.sources", "data.evaluation",
    "data.tokenizer",
    "model.path", "model.lora.path", "model.lora.merge",
)  # fmt: skip
DURATION = ("optim.steps", "optim.epochs")  # unknown of checkpoints of earlier versions
# Settings that it may change too, which is reported: `train_step` sets the learning rate of each step, fewer ranks may
# need larger micro-batches, and a streamed run may have ended at a malformed record. The optimizer's others, clip and
# weight_decay among them, are restored from the checkpoint.
REPORTED = (
    *DURATION, "optim.lr", "optim.warmup", "optim.final_lr", "optim.schedule", "optim.decay", "optim.micro_batch",
    "data.malformed",
)  # fmt: skip
# Settings that checkpoints of earlier versions lack, and the values with which these were written.
ADDED = {
    "optim.eps": 1e-8, "model.freeze": [], "model.neftune_alpha": 0.0, "model.lora.experts": [],
    "data.train_on": "all_turns",
}  # fmt: skip
LORA = ("model.lora.rank", "model.lora.digest")  # without which a run has no others of model.lora
TOKENIZER = "tokenizer.digest"  # says why other tokens are; one that gives the same tokens is not refused
BY_DIGEST = {
    "data.digest": "data.path or data.sources has other tokens",
    "model.digest": "model.path has another model",
    "model.lora.digest": "model.lora.path has another adapter",
    TOKENIZER: "data.tokenizer is another one",
}


def check_fits(path: Path, manifest: dict[str, Any], world: World, settings: dict) -> list[str]:
    """The changes that are reported, in words. ConfigError for a checkpoint of other settings or versions."""
    if (before := manifest.get("positions", "sequence")) != POSITIONS:
        raise ConfigError(
            f"{path} counts positions within each {before}, this version of ringflash within each {POSITIONS}: "
            f"resume with the version that wrote it, or start again from its exported weights (model.path)"
        )
    moved = [f"{name}={now} replaces {manifest[name]}" for name, now in grid(world).items() if manifest[name] != now]
    return moved + _check_settings(path, settings_to_match(manifest["settings"]), settings_to_match(settings))


def grid(world: World) -> dict[str, int]:
    """The grid of ranks, whichever settings led to it."""
    return {"ranks": world.size, "ring": world.ring.size, "ulysses": world.size // world.replicas // world.ring.size}


def _check_settings(path: Path, before: dict, now: dict) -> list[str]:
    changes = []
    lacking = ADDED | {key: now[key] for key in DURATION if key in now}
    before = {key: value for key, value in lacking.items() if key in now} | before
    for key in sorted((before.keys() | now.keys()) - {TOKENIZER}, key=lambda key: (key not in LORA, key)):
        if before.get(key) != now.get(key):
            if key == "data.digest" and before.get(TOKENIZER) not in (None, now.get(TOKENIZER)):
                key = TOKENIZER
            was, is_now = shown(before.get(key)), shown(now.get(key))
            if key in before and _may_change(key, (before[key], now.get(key))):
                changes.append(f"{key}={is_now} replaces {was}")
                continue
            if key in BY_DIGEST:
                raise ConfigError(
                    f"{BY_DIGEST[key]} than when {path} was written (digest {is_now}, not {was}): "
                    f"resume with the same, or start again (resume=never)"
                )
            raise ConfigError(
                f"{key}={is_now} differs from {was}, with which {path} was written: resume with that value, or start "
                f"again (resume=never)"
            )
    return changes


def _may_change(key: str, values: tuple[Any, Any]) -> bool:
    """Whether a resumed run may change a setting, which is reported, from the first of the values to the second."""
    if key == "memory.zero":
        return 0 not in values  # without ZeRO, all ranks have all states, in one file
    if key == "memory.optimizer_states":
        return "bf16" not in values  # which have other bits of the weights and rounded moments
    return key in REPORTED


def settings_to_match(settings: dict, prefix: str = "") -> dict:
    """The settings that a resumed run must share, by dotted key."""
    found = {}
    for name, value in settings.items():
        key = prefix + name
        if isinstance(value, dict):
            found.update(settings_to_match(value, f"{key}."))
        elif not key.startswith(FREE):
            found[key] = value
    return found
