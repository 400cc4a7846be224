"""The card of a data set of the Hugging Face hub: README.md, whose head lists the data set's configurations.

    configs:
    - config_name: main                 one reading of the data set
      data_files:
      - split: train
        path: main/train-*
    - config_name: socratic             another, often of the same records
      data_files: socratic/*.parquet

Training on the files of several configurations may train on records twice.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml


def configurations(folder: Path) -> dict[str, list[str]]:
    """The patterns of the files of each configuration, by its name; {} without a card that lists any."""
    try:
        head = (folder / "README.md").read_text(encoding="utf-8").split("---")
        listed = yaml.safe_load(head[1])["configs"] if not head[0].strip() else []
        return {str(one["config_name"]): _patterns(one.get("data_files") or f"{one['data_dir']}/*") for one in listed}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return {}


def configurations_of(folder: Path, files: list[Path]) -> dict[str, list[str]]:
    """The configurations of which `files`, all below `folder`, has some."""
    names = [file.relative_to(folder).as_posix() for file in files]
    found = configurations(folder).items()
    return {name: patterns for name, patterns in found if any(_matches(file, patterns) for file in names)}


def _matches(file: str, patterns: list[str]) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)


def _patterns(given: Any) -> list[str]:
    """The patterns in data_files: one, a list of them, or a list of those of splits."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, dict):
        return _patterns(given["path"])
    return [pattern for one in given for pattern in _patterns(one)]
