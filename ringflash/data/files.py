"""Files: what a folder's glob patterns match, and what they leave out.

A pattern is a path below the folder. `*`, `?` and `[...]` match inside a name, and `**` matches any number of folders.
Names that begin with a dot are hidden: only a pattern that begins with a dot matches them.

The search walks the tree once for all patterns. A folder's state is what remains of the patterns below it:

    patterns "**/*.txt", "notes/*.md"
    .           {"**/*.txt", "*.txt", "notes/*.md"}
    notes       {"**/*.txt", "*.txt", "*.md"}
    notes/old   {"**/*.txt", "*.txt"}

Links are followed. Each real folder is searched once per state, so links that form loops end, as do links by which a
folder has exponentially many paths.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import NamedTuple

from ringflash.errors import ConfigError, reason

KINDS = 8  # suffixes that `suffixes` lists

State = frozenset[tuple[str, ...]]  # the parts that remain of each pattern; () matches the name itself


class Matches(NamedTuple):
    """The result of a search: files that a pattern matches, and the other files of the folders that were searched.

    Both are sorted. Each file is there once, by its shortest path. Hidden files are not among the others.
    """

    files: list[Path]
    others: list[Path]


def search(folder: Path, patterns: Iterable[str]) -> Matches:
    """The files below `folder`. Raises ConfigError for a folder that cannot be listed, and for a link to nothing."""
    start = _with_no_folder({PurePath(pattern).parts for pattern in patterns})
    matched: dict[str, Path] = {}  # by real path
    others: dict[str, Path] = {}
    queue = deque([(folder, os.path.realpath(folder), start)])
    seen = {(os.path.realpath(folder), start)}
    while queue:
        directory, real_directory, state = queue.popleft()
        for entry in _entries(directory):
            below = _below(state, entry.name)
            file = directory / entry.name
            real = os.path.realpath(file) if entry.is_symlink() else os.path.join(real_directory, entry.name)
            if entry.is_dir():
                if below and (real, below) not in seen:
                    seen.add((real, below))
                    queue.append((file, real, below))
            elif () in below:
                if not os.path.exists(real):
                    raise ConfigError(f"{file} is a link to {real}, which does not exist")
                if entry.is_file():
                    matched.setdefault(real, file)  # the search goes by depth and by name: the first is the shortest
            elif entry.is_file() and not _hidden(entry.name):
                others.setdefault(real, file)
    return Matches(sorted(matched.values()), sorted(file for real, file in others.items() if real not in matched))


def is_below(pattern: str) -> bool:
    """Whether a pattern names something below its folder."""
    path = PurePath(pattern)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def suffixes(files: Iterable[Path]) -> str:
    """How many files have which suffix, "12 .TXT, 3 .pdf, 1 without a suffix"; the most frequent first."""
    counts = Counter(file.suffix or "without a suffix" for file in files).most_common()
    listed = [f"{count} {printable(suffix)}" for suffix, count in counts[:KINDS]]
    rest = sum(count for _, count in counts[KINDS:])
    return ", ".join([*listed, *([f"{rest} with others"] if rest else [])])


def printable(name: str) -> str:
    """A file name for a message: bytes that are not UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    if not os.access(directory, os.R_OK | os.X_OK):
        raise ConfigError(f"{directory} cannot be listed: permission denied; data.files may leave it out")
    try:
        with os.scandir(directory) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be listed: {error.strerror or reason(error)}") from error


def _below(state: State, name: str) -> State:
    """What remains of the patterns below `name`, a file or folder."""
    rest = set()
    for first, *parts in filter(None, state):
        if first == "**":
            if not _hidden(name):
                rest.add((first, *parts))
        elif fnmatchcase(name, first) and (first.startswith(".") or not _hidden(name)):
            rest.add(tuple(parts))
    return _with_no_folder(rest)


def _with_no_folder(patterns: set[tuple[str, ...]]) -> State:
    """The patterns, and what follows a `**` of each: it also matches no folder at all."""
    all_of_them = set(patterns)
    for pattern in patterns:
        while pattern and pattern[0] == "**":
            pattern = pattern[1:]
            all_of_them.add(pattern)
    return frozenset(all_of_them)


def _hidden(name: str) -> bool:
    return name.startswith(".")
