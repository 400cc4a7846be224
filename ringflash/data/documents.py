"""Documents: the files of a path, tokenised once into two flat arrays on disk.

    <data.cache>/<fingerprint>/    tokens.npy, offsets.npy, corpus.json: see cache.py

The fingerprint covers all that decides the tokens: files, sizes, times of change, formats, field, tokenizer. The folder
is written in a scratch folder and renamed when complete, so a killed build leaves nothing that looks finished. Builders
that run at the same time do not disturb each other: the first to finish wins. Run one rank ahead of the others to save
the work. A damaged folder is replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ringflash.data import cache
from ringflash.data.files import Matches, is_below, search, suffixes
from ringflash.data.formats import FIELD, FORMATS, IDS, format_of, texts, token_ids
from ringflash.data.scratch import scratch_folder
from ringflash.data.tokenizer import encoder, load_tokenizer, tokenizer_size
from ringflash.errors import ConfigError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUP = 1 << 20  # characters tokenised at once: enough documents for a tokenizer's threads, bounded memory

Document = TypeVar("Document", str, np.ndarray)
Source = tuple[Path, str]  # a file, and the format to read it by


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text to train on, and how it becomes sequences. Raises ConfigError, naming the key, for a bad value."""

    path: str
    """File or folder with the text; there is no default."""

    files: list[str] = dataclasses.field(
        default_factory=lambda: [
            *("**/*.txt", "**/*.json", "**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst", "**/*.ndjson"),
            *("**/*.csv", "**/*.tsv", "**/*.parquet"),
        ]
    )
    """Glob patterns below `path`, if that is a folder. Hidden files match only a pattern that begins with a dot."""

    format: str | None = None
    """How to read each file: text (one document), jsonl, json, csv, tsv or parquet. null: by the file's suffix."""

    field: str | None = None
    """Name of the JSON field or of the column that holds the text; null: "text", where the format has fields.
    input_ids: a list of the tokenizer's ids per document instead of text; nothing is added to them."""

    tokenizer: str = "bytes"
    """"bytes" (ByT5: one token per byte, vocabulary 384), or a local folder with any Hugging Face tokenizer."""

    cache: str = "runs/.cache"
    """Folder for tokenised text, 2 or 4 bytes per token; entries may be deleted at any time between runs."""

    held_out: float = 0.05
    """Fraction of the documents kept apart for evaluation, at least one document; 0 keeps none, and nothing is
    evaluated."""

    seed: int = 0
    """Decides which documents are held out, and the order of training."""

    sequence_length: int = 8192
    """Tokens in a packed sequence, all ranks together."""

    def __post_init__(self) -> None:
        patterns = not isinstance(self.files, str) and len(self.files) > 0 and all(map(is_below, self.files))
        for key, valid, expected in (
            ("path", bool(self.path), "a file or folder"),
            ("files", patterns, "a list of one or more patterns below data.path, such as ['*.txt']"),
            ("format", self.format is None or self.format in FORMATS, f"null or one of {', '.join(FORMATS)}"),
            ("field", self.field != "", "null or the name of a field"),
            ("tokenizer", bool(self.tokenizer), "bytes or a folder"),
            ("cache", bool(self.cache), "a folder"),
            ("held_out", 0 <= self.held_out < 1, "a fraction, 0 or more and below 1"),
            ("seed", 0 <= self.seed < 2**64, "0 or more and below 2^64"),
            ("sequence_length", self.sequence_length >= 2, "2 or more tokens"),
        ):
            if not valid:
                raise ConfigError(f"data.{key}={getattr(self, key)} must be {expected}")


def python_stdlib() -> str:
    """The folder of this Python's standard library: megabytes of real text on every machine."""
    return sysconfig.get_paths()["stdlib"]


def tokenised(config: DataConfig, *, verify: bool = True) -> cache.Cache:
    """The tokenised documents of `config`, built if they are not in the cache, and again if they are damaged there.

    verify: compare the tokens with their digest. Raises ConfigError, in one line that names the key or the file, for
    input that cannot be found, read or used.
    """
    (sources, left_out), tokenizer = find_files(config), load_tokenizer(config)
    finished = Path(config.cache).expanduser() / _fingerprint(sources, config, tokenizer)
    found = os.path.exists(finished)  # pathlib raises for a name that is too long
    if found:
        try:
            return cache.read(finished, verify)
        except cache.DamagedError as damage:
            print(f"{finished}: {damage}; tokenising data.path={config.path} again", flush=True)
    with _scratch(config, finished.name) as scratch:
        if found:
            _move(finished, scratch / "damaged")
        built = scratch / "built"
        built.mkdir()
        if left_out:
            print(f"data.path={config.path} has files that data.files leaves out: {suffixes(left_out)}", flush=True)
        _build(built, config, sources, tokenizer)
        made = cache.read(built, verify=False)  # before the rename: a mapped file outlives its folder
        try:
            built.rename(finished)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another builder was first: its folder is the same
                raise
    return made


@contextlib.contextmanager
def _scratch(config: DataConfig, name: str) -> Iterator[Path]:
    """A folder beside the finished ones, deleted after use. Raises ConfigError where the cache cannot be written."""
    try:
        with scratch_folder(Path(config.cache).expanduser(), name) as scratch:
            yield scratch
    except OSError as error:  # a full disk, too; errors of the files that are read are ConfigErrors by then
        raise ConfigError(f"data.cache={config.cache} cannot be written: {error.strerror or reason(error)}") from error


def _move(damaged: Path, aside: Path) -> None:
    """Moves a damaged cache to where it is deleted. Another process that found the damage may have moved it."""
    with contextlib.suppress(FileNotFoundError):
        damaged.rename(aside)


def find_files(config: DataConfig) -> tuple[list[Source], list[Path]]:
    """The files of `config.path` and `config.files` with the format to read each by, and the files that are left out.

    Raises ConfigError if there are none, or if the format of one is unknown.
    """
    path = Path(config.path).expanduser()
    if not os.path.exists(path):  # pathlib raises for a name that is too long
        hint = "; patterns belong into data.files" if glob.has_magic(config.path) else ""
        raise ConfigError(f"data.path={config.path} does not exist{hint}")
    found = Matches([path], []) if path.is_file() else search(path, config.files)
    if not found.files:
        there = f"; the folder has {suffixes(found.others)}" if found.others else ""
        raise ConfigError(f"data.path={config.path} data.files={list(config.files)} match no file{there}")
    return [(file, format_of(file, config.format, config.field)) for file in found.files], found.others


def _build(folder: Path, config: DataConfig, sources: list[Source], tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the cache into `folder`."""
    size = tokenizer_size(tokenizer)
    documents: Iterator[np.ndarray]
    if config.field == IDS:
        documents = _documents(sources, lambda file, form: token_ids(file, form, size))
    else:
        field, guessed = config.field or FIELD, config.format is None
        encode = encoder(tokenizer, config.tokenizer)
        found = _documents(sources, lambda file, form: texts(file, form, field, guessed))
        documents = (tokens for group in _groups(found) for tokens in encode(group))
    first = next(documents, None)
    if first is None:
        raise ConfigError(f"data.path={config.path} holds no text: all of its documents are empty")
    made_of = {"path": config.path, "files": len(sources), "tokenizer": config.tokenizer}
    cache.write(folder, itertools.chain([first], documents), size, made_of)


def _documents(sources: list[Source], read: Callable[[Path, str], Iterator[Document]]) -> Iterator[Document]:
    """All documents that are not empty, in the order of the files, behind a progress bar over the files' bytes."""
    from tqdm import tqdm

    total = sum(file.stat().st_size for file, _ in sources)
    with tqdm(desc="tokenising", total=total, unit="B", unit_scale=True) as bar:
        for file, form in sources:
            left = file.stat().st_size
            try:
                for document in read(file, form):
                    step = min(left, len(document))
                    left -= step
                    if len(document):
                        yield document
                    bar.update(step)
            except ConfigError:
                raise
            except Exception as error:  # pyarrow and the codecs share no base class
                raise ConfigError(f"{file} cannot be read: {reason(error)}") from error
            bar.update(left)


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in groups of about GROUP characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _fingerprint(sources: list[Source], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for all that decides the tokens. st_ctime tells a change that left size and st_mtime as they were."""
    stats = []
    for file, form in sources:
        stat = file.stat()
        stats.append((str(file.resolve()), form, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    vocabulary = sorted(tokenizer.get_vocab().items())
    field, kind = config.field or FIELD, type(tokenizer).__name__
    made_of = [cache.FORMAT, stats, config.format is None, field, kind, rules, tokenizer.eos_token, vocabulary]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
