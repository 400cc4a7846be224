"""Errors of settings that cannot work, of training that diverged, and of full GPUs and disks."""

import difflib
import os
import re
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting, file or folder that cannot work.

    The message is one line for the user: it names the key (or the file), the value it has, and what is possible.
    The trainer prints only this line, without a traceback.
    """


class DivergedError(ArithmeticError):
    """Training has diverged: losses, gradients or weights are not finite.

    The message is one line for the user. All ranks raise it alike, and the trainer prints it without a traceback.
    """


class GpuMemoryError(RuntimeError):
    """Out of GPU memory. The message is one line that names the part of the step and the settings to change."""


class DiskError(OSError):
    """A file of a run was not written; the message is one line that names it and the space left."""


def check_settings(group: str, settings: object, checks: Iterable[tuple[str, bool, str]]) -> None:
    """Raise ConfigError for the first of a group's settings that is not valid.

    checks: of each setting its name, whether it is valid, and what it must be.
    """
    for name, valid, expected in checks:
        if not valid:
            raise ConfigError(f"{group}.{name}={getattr(settings, name)} must be {expected}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ConfigError for a setting whose value is none of the choices."""
    if value not in (known := [*choices]):
        raise ConfigError(f"{name}={value} is not one of {', '.join(map(str, known))}")


def hub_hint(path: str, *, dataset: bool = False) -> str:
    """How to get a model, tokenizer or data set whose name on the Hugging Face hub was given as a folder; else nothing.

    A data set's name has an owner. One without may be a mistyped folder.
    """
    owner = r"[\w.-]+/" if dataset else r"([\w.-]+/)?"
    if os.path.exists(path) or not re.fullmatch(owner + r"[\w.-]+", path):
        return ""
    kind, option = ("data set", " --repo-type dataset") if dataset else ("model", "")
    command = f"hf download {path[:100]}{option} --local-dir FOLDER"
    return f"; nothing is downloaded: `{command}` downloads a {kind} from the hub"


def did_you_mean(given: str, known: Iterable[str], form: str = "{}", otherwise: str = "") -> str:
    """The end of an error about an unknown name: the known name nearest to it, in `form`; `otherwise` if none is near.

    >>> "modl is not a setting" + did_you_mean("modl", ["model", "data"], "{}=...")
    'modl is not a setting; did you mean model=...?'
    """
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {form.format(close[0])}?" if close else otherwise


def in_one_line(error: BaseException) -> str:
    """An error's message without line breaks, cut off if it is long; the kind of an error that has none."""
    message = " ".join(str(error).split())[:400]
    return f"KeyError: {message}" if isinstance(error, KeyError) else message or type(error).__name__


def reason(error: BaseException) -> str:
    """The first line of an error's message, with the next where it announces that, or the error's kind."""
    first, *others = (line.strip() for line in str(error).strip().splitlines() or [type(error).__name__])
    return f"{first} {others[0]}" if others and first.endswith(":") else first


def shown(value: object) -> str:
    """A setting's value as a command line takes it: true, null, a list of numbers as [1,2], a line break as \\n."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    text = str(value).lower() if isinstance(value, bool) else str(value).replace("\n", "\\n")
    return "null" if value is None else text
