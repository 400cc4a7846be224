"""Overrides: the key=value settings of a command line, rewritten for Hydra's grammar.

Hydra parses a value before it knows the setting's type: name=1e5 would become 100000.0, and data.path=/x/a=b or /x/(c)
would not parse. A setting of one value is therefore quoted here, and its type converts it. null, a value in quotes and
${...} have their meaning in Hydra. Lists, dictionaries and fields of model.architecture keep Hydra's grammar.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from ringflash.errors import ConfigError
from ringflash.training.other_names import OTHER_NAMES

RENAMED = {  # settings of earlier versions, and their names now
    "runs": "output_dir",
    "model.kernel": "attention.kernel",
    "model.deterministic": "attention.deterministic",
    "model.compensated": "attention.compensated",
    "parallel.node_gb_per_second": "parallel.intra_node_bandwidth_gb",
    "parallel.across_gb_per_second": "parallel.inter_node_bandwidth_gb",
}

# Dictionaries that take any key; what reads them knows which are possible
OPEN = ("model.rope_parameters", "data.chat_template_kwargs", "data.columns", "data.sources", "data.evaluation")
# Those that are null unless they are set: Hydra merges no dictionary into null, but sets it in that of its group
NULL = ("data.evaluation.chat_template_kwargs", "data.evaluation.columns")
LISTS = (list, tuple)
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_OVERRIDE = re.compile(r"(?P<prefix>\+\+?|~)?(?P<key>[^=]+?)(?:=(?P<value>.*))?", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)


def for_hydra(override: str, schema: type, folder: Path) -> str:
    """`override`, so quoted that Hydra reads it as typed. schema: dataclass of all settings; folder: the YAML groups.

    Raises ConfigError, in one line, for what is not key=value, for an unknown setting or option, and for a value that
    Hydra cannot parse; then it names the quotes that the value needs.
    """
    found = _OVERRIDE.fullmatch(override)
    if found is None or (found["value"] is None and found["prefix"] != "~"):
        raise ConfigError(f"{override!r} is not of the form key=value")
    prefix, key, value = found["prefix"] or "", found["key"], found["value"]
    if key.startswith("data.sources."):
        raise ConfigError(
            f"{override}: data.sources is set as a whole, as in data.sources='{{books: {{path: books}}}}'"
        )
    is_group = re.fullmatch(r"\w+(/\w+)*", key) is not None and (folder / key).is_dir()
    if is_group and not (value or "").startswith("{"):
        return override if value is None else f"{prefix[:1]}{key}={_option(folder / key, key, value)}"
    kind = kind_of(key, schema)
    if kind is None:
        raise ConfigError(unknown(key, schema))
    if prefix == "~" and kind is not Any:
        raise ConfigError(f"{override} would remove a setting, but each has a value: set {key}=... to another one")
    if value is None:
        return override
    if kind is bool and value.lstrip("+-").isdecimal() and value not in ("0", "1"):
        raise ConfigError(f"{key}={value} must be true or false")
    if _names(kind):
        return f"{prefix}{key}={value if value == 'null' or _QUOTED.fullmatch(value) else _quoted(value)}"
    _check_parsed(override, key, value, kind)
    if key in NULL and value.startswith("{"):
        group, _, name = key.rpartition(".")
        return f"++{group}={{{name}: {value}}}"
    is_open = f"{key}.".startswith(tuple(f"{name}." for name in OPEN))
    return f"++{key}={value}" if not prefix and is_open else override


def kind_of(key: str, schema: type) -> Any:
    """The type of the setting at a dotted key; Any below a dictionary; None if there is no such setting."""
    kind: Any = schema
    for name in key.split("."):
        if is_dataclass(kind):
            kind = get_type_hints(kind).get(name)
        elif kind is Any or get_origin(kind) is dict:
            kind = Any
        elif get_origin(kind) in LISTS and name.isdecimal():
            kind = get_args(kind)[0]
        else:
            return None
    return kind


def wanted(kind: Any) -> str:
    """What a value of this type must be, for an error: "a whole number", "a number or null", ..."""
    null = " or null" if type(None) in get_args(kind) else ""
    return (
        " or ".join(_names(kind)) + null if _names(kind) else "a list" if get_origin(kind) in LISTS else "a dictionary"
    )


def unknown(key: str, schema: type) -> str:
    """The error for an unknown setting, with the setting that was perhaps meant, or those of its group."""
    if key in RENAMED:
        return f"{key} is not a setting; did you mean {RENAMED[key]}?"
    keys = [*_keys(schema)]
    group, _, last = key.lower().rpartition(".")
    if last in OTHER_NAMES and not any(other.rpartition(".")[2] == last for other in keys):
        return f"{key} is not a setting; did you mean {OTHER_NAMES[last]}?"
    longer = [other for other in keys if group and other.startswith(f"{key.lower()}_")]
    named = longer or [other for other in keys if other.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key.lower(), named or keys, n=1, cutoff=0.0 if named else 0.75)
    if close and not key.startswith(f"{close[0]}."):
        return f"{key} is not a setting; did you mean {close[0]}?"
    its = [other.removeprefix(f"{group}.") for other in keys if other.startswith(f"{group}.")]
    return f"{key} is not a setting" + (f"; {group} has {', '.join(its)}" if its else "")


def typed_value(key: str, overrides: Sequence[str]) -> str | None:
    """The last value that a command line gives to `key`; None if it gives none."""
    found = (_OVERRIDE.fullmatch(override) for override in reversed(overrides))
    return next((match["value"] for match in found if match and match["key"] == key), None)


def _names(kind: Any) -> list[str]:
    """The names of the types of a single value, such as int or str | None; empty for lists and dictionaries."""
    return (
        []
        if get_origin(kind) in (*LISTS, dict)
        else [_NAMES[one] for one in (get_args(kind) or (kind,)) if one in _NAMES]
    )


def _option(group: Path, key: str, value: str) -> str:
    """The quoted name of a YAML file in the folder `group`."""
    name = value[1:-1] if _QUOTED.fullmatch(value) else value
    options = sorted(path.stem for path in group.glob("*.yaml"))
    if name not in options:
        raise ConfigError(f"{key}={value} is not one of {', '.join(options)}")
    return _quoted(name)


def _check_parsed(override: str, key: str, value: str, kind: Any) -> None:
    """Raise ConfigError for an override that Hydra cannot parse, or that is not one value of its kind."""
    is_list, of_numbers = get_origin(kind) in LISTS, get_origin(kind) is tuple
    example = _list_of(value, of_numbers) if is_list else QuotedString(value, Quote.double).with_quotes()
    hint = shlex.quote(f"{key}={example}")
    try:
        parsed = OverridesParser.create().parse_override(override)
        given = parsed.value()
    except HydraException as error:
        raise ConfigError(f"{key}={value} does not parse: text of other than letters, digits and -_./ needs quotes, "
                          f"such as {hint}") from error  # fmt: skip
    if parsed.is_sweep_override() and not is_list:
        raise ConfigError(f"{key}={value} has several values, but a run takes one: {hint} is text, [...] a list")
    interpolated = isinstance(given, str | QuotedString) and "${" in str(given)
    if is_list and not interpolated:
        fits = (lambda one: type(one) is int) if of_numbers else (lambda one: isinstance(one, str | QuotedString))
        if not isinstance(given, list) or not all(map(fits, given)):
            wanted = "whole numbers" if of_numbers else "text in quotes"
            raise ConfigError(f"{key}={value} must be a list of {wanted}, such as {hint}")


def _list_of(value: str, of_numbers: bool) -> str:
    """The list of quoted text or of numbers that a value perhaps means: *.txt,*.md is ["*.txt","*.md"]."""
    if of_numbers:
        return f"[{','.join(re.findall(r'[0-9]+', value)) or 4096}]"
    names = [name.strip(" '\"") for name in value.strip("[] '\"").split(",")]
    quoted = [QuotedString(name, Quote.double).with_quotes() for name in names if name]
    return "[" + ",".join(quoted or ['"*.txt"']) + "]"


def _quoted(value: str) -> str:
    return QuotedString(value, Quote.single).with_quotes()


def _keys(part: Any, prefix: str = "") -> Iterator[str]:
    """Every key below a dataclass, dotted."""
    for name, kind in get_type_hints(part).items():
        yield prefix + name
        if is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{name}.")
