"""Compose: the Config of a command line.

Hydra composes the dataclasses' defaults, the YAML groups in configs/ and the command line. The result is checked
against the dataclasses: a setting or value that does not fit ends the run before anything is started.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

import hydra
import omegaconf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from ringflash.data import python_stdlib
from ringflash.errors import ConfigError, in_one_line, shown
from ringflash.models import ARCHITECTURES
from ringflash.models.architecture import LARGEST
from ringflash.models.configuration import field_refusal
from ringflash.training.config import Config
from ringflash.training.overrides import for_hydra, kind_of, typed_value, unknown, wanted

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PATHS = (
    "output_dir",
    "model.path",
    "model.lora.path",
    "data.path",
    "data.evaluation.path",
    "data.tokenizer",
    "data.cache",
    "evaluation.needle.text",
)  # in which ~ is the home folder

OmegaConf.register_new_resolver("python_stdlib", python_stdlib, replace=True)


def compose(overrides: Sequence[str] = (), folder: Path = CONFIGS) -> tuple[Config, str]:
    """The Config of `key=value` overrides, and the same resolved as YAML.

    Raises ConfigError, in one line, for an unknown setting, group or experiment, a value of the wrong type or one
    that is missing.
    """
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="schema", node=_schema(Config))
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            given = [for_hydra(override, Config, folder) for override in overrides]
            raw = hydra.compose("train", overrides=[*given, *_implied(overrides)])
        missing = sorted(OmegaConf.missing_keys(raw))
        if missing:
            raise ConfigError(f"{missing[0]} is not set; add {missing[0]}=... to the command line")
        settings = cast(dict[str, Any], OmegaConf.to_container(raw, resolve=True))
        _expand_home(settings)
        return built(Config, settings), OmegaConf.to_yaml(OmegaConf.create(settings))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_message_of(error, overrides)) from error


def _implied(overrides: Sequence[str]) -> list[str]:
    """optim.steps=null where a command line sets optim.epochs alone: its steps replace those of the defaults."""
    epochs, steps = (typed_value(f"optim.{name}", overrides) for name in ("epochs", "steps"))
    return ["optim.steps=null"] if epochs not in (None, "null") and steps is None else []


@functools.cache
def _schema(part: Any) -> type:
    """A dataclass's fields without its checks and not frozen, which Hydra fills in and OmegaConf type-checks."""
    kinds = get_type_hints(part)
    opened: list[tuple[str, Any, Any]] = []
    for f in fields(part):
        kind = kinds[f.name]
        if get_origin(kind) is dict and is_dataclass(named := get_args(kind)[1]):
            opened.append((f.name, dict[str, _schema(named)], field(default_factory=dict)))  # type: ignore[misc, arg-type]
        elif is_dataclass(kind):
            child = _schema(kind)  # type: ignore[arg-type]  # a class is hashable
            opened.append((f.name, child, field(default_factory=child)))
        elif f.default_factory is not dataclasses.MISSING:
            opened.append((f.name, kind, field(default_factory=f.default_factory)))
        else:
            opened.append((f.name, kind, omegaconf.MISSING if f.default is dataclasses.MISSING else f.default))
    return make_dataclass(part.__name__, opened, kw_only=True)


def built(part: type, settings: dict[str, Any], prefix: str = "") -> Any:
    """The dataclass made of settings of the right types; its own checks run here.

    prefix: what their names begin with, in errors. Raises ConfigError for a name or a value that it cannot have.
    """
    kinds = get_type_hints(part)
    for name in settings:
        if name not in kinds:
            raise ConfigError(unknown(prefix + name, Config))
        several = get_origin(kinds[name]) is tuple
        given = tuple(settings[name]) if several else settings[name]
        for value in given if several else [given]:
            if isinstance(value, int) and name != "seed" and abs(value) > LARGEST:  # kernels hold counts in 32 bits
                raise ConfigError(f"{prefix}{name}={shown(given)} must be {LARGEST} at most")
    return part(**{name: _built_value(kinds[name], value, f"{prefix}{name}.") for name, value in settings.items()})


def _built_value(kind: Any, value: Any, prefix: str) -> Any:
    """The value of a setting: a dataclass, a dictionary of them, or the value itself."""
    if is_dataclass(kind):
        return built(kind, value, prefix)  # type: ignore[arg-type]  # a class is hashable
    if get_origin(kind) is dict and is_dataclass(named := get_args(kind)[1]):
        return {name: built(named, given, f"{prefix}{name}.") for name, given in value.items()}  # type: ignore[arg-type]
    return tuple(value) if get_origin(kind) is tuple else value


def _expand_home(settings: dict[str, Any]) -> None:
    """Replace a leading ~ of each path, which a shell leaves as it is in key=~/folder."""
    for key in PATHS:
        *groups, name = key.split(".")
        part = functools.reduce(dict.__getitem__, groups, settings)
        value = part.get(name) or ""
        if value.startswith("~"):
            try:
                part[name] = str(Path(value).expanduser())
            except RuntimeError as error:
                raise ConfigError(f"{key}={value} names no user of this machine") from error


def _message_of(error: Exception, overrides: Sequence[str]) -> str:
    """The error with the setting and its value as typed, or else Hydra's or OmegaConf's own message."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name} is not one of {', '.join(error.options)}"
    cause: BaseException = error
    if isinstance(cause, HydraException) and isinstance(cause.__context__, OmegaConfBaseException):
        cause = cause.__context__
    while isinstance(cause.__cause__, OmegaConfBaseException):
        cause = cause.__cause__
    key, parent = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    reason = str(cause).split("\n", 1)[0]
    if key and re.search(r"not in (struct|')", reason):
        return _unknown_field(key, parent) if key.startswith("model.architecture.") else unknown(key, Config)
    if added := re.match(r"Multiple values for (\S+)\. |Could not append .* is already at '(\S+)'", str(error)):
        name = added[1] or added[2]
        return f"+{name}={typed_value(name, overrides)}: {name} is set already; leave out the +"
    typed, kind = typed_value(key or "", overrides), kind_of(key or "", Config)
    if isinstance(cause, ValidationError) and typed is not None and kind is not None:
        return f"{key}={typed} must be {wanted(kind)}"
    if typed is not None and "${" in typed:
        return f"{key}={typed}: {reason}; ${{oc.env:NAME}} is a variable of the environment, \\${{ is text"
    return f"{key}: {reason}" if key else in_one_line(error)


def _unknown_field(key: str, parent: Any) -> str:
    """The error for a key of model.architecture that `parent`, its YAML, lacks; transformers may have the field."""
    name, model_type = key.removeprefix("model.architecture."), parent.get("model_type")
    reason = field_refusal(model_type, name) if model_type in ARCHITECTURES and "." not in name else None
    return reason or f"{key} is not in this model's architecture; +{key}=... adds it"
