"""Rotary positions (RoPE): which kinds are exact on shards, how many positions they reach, and how to extend them.

`rope_parameters` of a transformers configuration is one dictionary, or one per kind of layer. model.rope_parameters
replaces some of its values, so that a pretrained model is extended without editing its config.json:

    model.rope_parameters={rope_type: yarn, factor: 4.0}
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ringflash.errors import ConfigError, did_you_mean

_SHARED = ("rope_type", "rope_theta", "partial_rotary_factor")
_STRETCHED = ("factor", "original_max_position_embeddings")
# The keys of each kind, apart from _SHARED.
KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "proportional": ("factor",),
    "yarn": (*_STRETCHED, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": (*_STRETCHED, "low_freq_factor", "high_freq_factor"),
    "dynamic": ("factor",),
}

LENGTH_DEPENDENT = ("dynamic", "longrope")


def rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The model's RoPE settings; some models keep one set for each kind of layer."""
    with contextlib.suppress(AttributeError):
        settings = config.rope_parameters or {}
        nested = [value for value in settings.values() if isinstance(value, dict)]
        return nested or [settings]
    return []


def rope_kinds(config: PreTrainedConfig) -> str:
    """The kinds of the model's RoPE, as a message shows them."""
    return ", ".join(rope.get("rope_type", "default") for rope in rope_parameters(config)) or "none"


def rope_refusal(config: PreTrainedConfig) -> str | None:
    """None, or the kind of RoPE that is not known to be the same on every shard."""
    for rope in rope_parameters(config):
        if (kind := rope.get("rope_type", "default")) not in (known := (*KINDS, "longrope")):
            return f"rope_parameters.rope_type={kind} is not supported; {listed(known)} are supported"
    return None


def scales_by_position(config: PreTrainedConfig) -> bool:
    """Whether a model scales queries or keys by their positions, which then must count within each document."""
    return any(rope.get("llama_4_scaling_beta") or rope.get("long_mscale") for rope in rope_parameters(config))


def supported_positions(config: PreTrainedConfig) -> int | None:
    """The number of positions that a model supports: its own, or those that its RoPE scales to. None: any number."""
    known = getattr(config, "max_position_embeddings", None)
    if known is None:
        return None
    scaled = [
        int(rope["factor"] * (rope.get("original_max_position_embeddings") or known))
        for rope in rope_parameters(config)
        if rope.get("rope_type", "default") != "default" and rope.get("factor")
    ]
    return max([known, *scaled])


def has_nominal_positions(config: PreTrainedConfig) -> bool:
    """Whether max_position_embeddings is a limit alone, and no parameter of the rotary positions."""
    return {rope.get("rope_type", "default") for rope in rope_parameters(config)} <= {"default", "linear", "llama3"}


def check_positions(what: str, tokens: int, config: PreTrainedConfig, setting: str) -> None:
    """Raise ConfigError for more tokens than a model has positions. what: the tokens; setting: what allows more."""
    known = supported_positions(config)
    if known is not None and tokens > known:
        raise ConfigError(
            f"{what} are {tokens} positions, more than the {known} that the model supports: shorten them, or allow it "
            f"by {setting}=true"
        )


def extended(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration with `changes` made to its rope_parameters.

    Values that are not named stay, unless rope_type changes: then only rope_theta and partial_rotary_factor do. With
    yarn and llama3, max_position_embeddings becomes what the RoPE scales to, as their published models have it. Raises
    ValueError, "KEY=... ...", for keys that the model or its kind of RoPE does not have.
    """
    own = getattr(config, "rope_parameters", None)
    if not own:
        raise ValueError(f"={dict(changes)}: a model of model_type={config.model_type} has no rotary positions")
    layers = {name: value for name, value in own.items() if isinstance(value, dict)}
    if layers:
        for name, value in changes.items():
            if name not in layers or not isinstance(value, Mapping):
                raise ValueError(
                    f".{name}={value}: this model has rotary positions for {listed(layers)}, so give a dictionary for "
                    f"one or both: model.rope_parameters={{{next(iter(layers))}: {{rope_type: yarn, factor: 4.0}}}}"
                )
        merged: dict[str, Any] = {
            name: _merged(value, changes.get(name, {}), f".{name}") for name, value in layers.items()
        }
    else:
        merged = _merged(own, changes, "")
    settings = config.to_dict() | {"rope_parameters": merged}
    if (known := settings.get("max_position_embeddings")) is not None:
        for rope in merged.values() if layers else [merged]:
            if rope["rope_type"] in ("yarn", "llama3"):
                rope.setdefault("original_max_position_embeddings", known)
                reach = int(rope.get("factor", 1) * rope["original_max_position_embeddings"])
                settings["max_position_embeddings"] = max(reach, settings["max_position_embeddings"])
    return type(config).from_dict(settings)


def _merged(own: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = changes.get("rope_type", own.get("rope_type", "default"))
    if kind not in KINDS:
        raise ValueError(f"{where}.rope_type={kind} is not one of {listed(KINDS)}")
    for name in changes:
        if name not in (keys := (*_SHARED, *KINDS[kind])):
            meant = did_you_mean(name, keys, otherwise=f": these are {listed(keys)}")
            raise ValueError(f"{where}.{name} is not a value of rope_type={kind}{meant}")
    kept = own if kind == own.get("rope_type", "default") else {k: v for k, v in own.items() if k in _SHARED}
    return {"rope_type": kind, **kept, **changes}


def listed(names: Any) -> str:
    """One name or more: a, b and c."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
