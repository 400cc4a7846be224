"""Help: every setting with its type, its default and its sentence, for `train.py --help`.

The sentences are the docstrings below the fields of Config and its parts, and the defaults are those of a run without
arguments, so neither is written twice.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ringflash.docstrings import field_docstrings
from ringflash.errors import shown
from ringflash.training.compose import CONFIGS, compose
from ringflash.training.config import Config
from ringflash.training.overrides import LISTS

WIDTH = 120
_NAMES = {int: "int", float: "float", bool: "bool", str: "text", type(None): "null", Any: "any"}


def settings_help() -> str:
    """All settings, group by group, as they are listed below the usage."""
    config, _ = compose()
    blocks = ["settings of the run", *_entries("", Config, config, nested=False)]
    for name, kind in get_type_hints(Config).items():
        if is_dataclass(kind):
            blocks += ["", f"{name}: {str(kind.__doc__).splitlines()[0]}", *_options(CONFIGS / name)]
            blocks += _entries(f"{name}.", kind, getattr(config, name))
    blocks += ["", "experiment: settings of several groups under one name", *_options(CONFIGS / "experiment")]
    return "\n".join(blocks)


def _entries(prefix: str, kind: Any, part: Any, nested: bool = True) -> Iterator[str]:
    """The settings of a dataclass, with the values of `part`. nested: also those of dataclasses in it."""
    for key, meaning in field_docstrings(kind).items():
        inner, default = get_type_hints(kind)[key], getattr(part, key)
        if not is_dataclass(inner):
            yield f"  {prefix}{key}={_value(default)}  ({type_name(inner)})"
            yield textwrap.fill(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        elif nested:
            yield from _entries(f"{prefix}{key}.", inner, default)


def type_name(kind: Any) -> str:
    """What a setting's type is called: "int", "text or null", "list of text"."""
    if get_origin(kind) in LISTS:
        return f"list of {type_name(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "fields"
    return " or ".join(type_name(one) for one in get_args(kind)) or _NAMES[kind]


def _value(default: Any) -> str:
    """A default as it is typed; a long list or many fields are left to --print."""
    if isinstance(default, list | tuple | dict):
        return "..." if default else "{}" if isinstance(default, dict) else "[]"
    return shown(default)


def _options(folder: Path) -> Iterator[str]:
    """The YAML files of a group, each with its first comment."""
    for path in sorted(folder.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = next(x.lstrip("# ") for x in lines if x.startswith("# ") and "@package" not in x)
        head = f"  {folder.name}={path.stem}"
        yield textwrap.fill(f"{head:<29} {comment}", WIDTH, subsequent_indent=" " * 30)
