"""Documents: the files of a path, tokenised once into flat arrays on disk.

    <data.cache>/<fingerprint>/    tokens.npy, offsets.npy, corpus.json and others: see cache.py

The fingerprint covers everything that determines the tokens: files, sizes, modification times, formats, fields,
tokenizer and chat template. The entry is built in a scratch folder (build.py) and renamed when it is complete. A killed
build therefore leaves nothing that looks finished, and the next build continues where it stopped. Builders that run at
the same time do not disturb each other: the first one to finish wins. To save work, let one rank build ahead of the
others. A damaged entry is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ringflash.data import build, cache
from ringflash.data.build import Job, Source
from ringflash.data.card import configurations_of
from ringflash.data.chat import Dialogues
from ringflash.data.config import DataConfig
from ringflash.data.files import Matches, search, suffixes
from ringflash.data.formats import format_of
from ringflash.data.preferences import Preferences
from ringflash.data.records import FIELD, IDS, Reading, Texts, TokenIds
from ringflash.data.scratch import delete_abandoned, others, scratch_folder
from ringflash.data.tokenizer import encoder, load_tokenizer, special_tokens, tokenizer_digest, tokenizer_size
from ringflash.errors import ConfigError, hub_hint, reason

BUILT = "built"  # in a scratch folder
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-zA-Z])")  # begins the name of a file or folder


def python_stdlib() -> str:
    """The folder of this Python's standard library, which is megabytes of real text on every machine."""
    return sysconfig.get_paths()["stdlib"]


def cache_folder(config: DataConfig) -> Path:
    """The cache entry of `config`, whether or not it exists yet."""
    return _folder(config, find_files(config)[0], load_tokenizer(config.tokenizer))


def _folder(config: DataConfig, sources: list[Source], tokenizer: PreTrainedTokenizerBase) -> Path:
    return Path(config.cache).expanduser() / _fingerprint(sources, config, tokenizer)


def tokenised(config: DataConfig, *, verify: bool = True, quiet: bool = False) -> cache.Cache:
    """The tokenised documents of `config`, which are built if they are missing from the cache or damaged.

    verify: compare the tokens with their digest. quiet: without a progress bar. Raises ConfigError, naming the setting
    or the file, for input that cannot be found, read or used.
    """
    (sources, left_out), tokenizer = find_files(config), load_tokenizer(config.tokenizer)
    finished = _folder(config, sources, tokenizer)
    found = os.path.exists(finished)  # pathlib raises for a name that is too long
    if found:
        try:
            return cache.read(finished, verify)
        except cache.DamagedError as damage:
            print(f"{finished}: {damage}; tokenising data.path={config.path} again", flush=True)
    with _scratch(config, finished.name) as scratch:
        if found:
            _move(finished, scratch / "damaged")
        built = scratch / BUILT
        built.mkdir()
        build.take_over(built, (other / BUILT for other in others(scratch, finished.name)))
        delete_abandoned(scratch, finished.name)
        if left_out:
            print(f"data.path={config.path} has files that data.files leaves out: {suffixes(left_out)}", flush=True)
        if done := build.read_progress(built).written.tokens:
            print(f"data.path={config.path}: a stopped run left {done:,} tokens, which this continues", flush=True)
        _build(built, config, sources, tokenizer, quiet)
        made = cache.read(built, verify=False)  # before the rename: a mapped file outlives its folder
        try:
            built.rename(finished)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another builder was first: its folder is the same
                raise
    return made


@contextlib.contextmanager
def _scratch(config: DataConfig, name: str) -> Iterator[Path]:
    """A folder beside the finished ones, deleted after use. Raises ConfigError if the cache cannot be written."""
    try:
        with scratch_folder(Path(config.cache).expanduser(), name) as scratch:
            yield scratch
    except OSError as error:  # a full disk, too; errors of the files that are read are ConfigErrors by then
        raise ConfigError(f"data.cache={config.cache} cannot be written: {error.strerror or reason(error)}") from error


def _move(damaged: Path, aside: Path) -> None:
    """Move a damaged entry aside, where it is deleted. Another process may have moved it already."""
    with contextlib.suppress(FileNotFoundError):
        damaged.rename(aside)


def find_files(config: DataConfig) -> tuple[list[Source], list[Path]]:
    """The files of `config.path` and `config.files` with the format to read each by, and the files that are left out.

    Raises ConfigError if there are none, or if the format of one is unknown.
    """
    path = Path(config.path or "").expanduser()
    if not os.path.exists(path):  # pathlib raises for a name that is too long
        several = "; data.sources takes several paths" if "," in str(config.path) else ""
        hint = several or ("; patterns belong into data.files" if glob.has_magic(str(config.path)) else "")
        raise ConfigError(f"data.path={config.path} does not exist{hint}{hub_hint(str(config.path), dataset=True)}")
    _check_one_split(config, path)
    found = Matches([path], []) if path.is_file() else search(path, config.files)
    files = [file for file in found.files if not _is_about_a_dataset(file)]
    if not files:
        there = f"; the folder has {suffixes(found.others)}" if found.others else ""
        raise ConfigError(f"data.path={config.path} data.files={list(config.files)} match no file{there}")
    asked = "data.chat=true" if config.chat else f"data.field={config.field}" if config.field else None
    sources = [(file, format_of(file, config.format, asked, config.field == IDS)) for file in files]
    _check_configurations(config, path, files)
    _check_named_splits(config, path, sources)
    return sources, found.others


def _check_named_splits(config: DataConfig, path: Path, sources: list[Source]) -> None:
    """Refuse records of several splits, such as train-00000-of-00002.parquet and test.parquet.

    Splits that data.files names are all wanted. Texts are exempt: source code has test.py beside train.py.
    """
    named = (SPLIT.match(name) for file, form in sources if form != "text" for name in file.relative_to(path).parts)
    splits = sorted({match[1] for match in named if match})
    unasked = [split for split in splits if not any(split in pattern for pattern in config.files)]
    if "train" in splits and len(splits) > 1 and unasked:
        pattern = "**/train*" if any(file.name.startswith("train") for file, _ in sources) else "**/train*/**/*"
        raise ConfigError(
            f"data.path={config.path} holds the splits {', '.join(splits)} of a data set: name those to train on in "
            f"data.files, as in data.files='[\"{pattern}\"]'; data.evaluation.path and .files evaluate on another"
        )


def _check_configurations(config: DataConfig, path: Path, files: list[Path]) -> None:
    """Refuse files of several configurations of a data set, unless data.files names them: they may share records."""
    found = configurations_of(path, files) if path.is_dir() else {}
    asked = {part for pattern in config.files for part in (pattern, *pattern.split("/"))}
    if len(found) > 1 and any(asked.isdisjoint((name, *patterns)) for name, patterns in found.items()):
        name, patterns = next(iter(found.items()))
        pattern = next((pattern for pattern in patterns if "train" in pattern), patterns[0])
        raise ConfigError(
            f"data.path={config.path} holds the configurations {', '.join(found):.300} of a data set (README.md): "
            f"name those to train on in data.files, as in data.files='[\"{pattern}\"]' for {name}"
        )


def _check_one_split(config: DataConfig, path: Path) -> None:
    """Refuse a folder of several splits that `datasets` saved: training would read them all."""
    try:
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise ConfigError(
        f"data.path={config.path} holds the splits {', '.join(splits)} of a dataset: give one, such as "
        f"data.path={path / splits[0]}"
    )


def _is_about_a_dataset(file: Path) -> bool:
    """Whether a file is none of the records that `datasets` saved to a folder, or wrote on the hub.

    It is metadata, or a cache-*.arrow, which `map`, `filter` and `shuffle` of a data set loaded from the folder leave.
    """
    if file.suffix == ".arrow":
        saved = _saved_tables(file.parent)
        return bool(saved) and file.name not in saved
    saved_here = file.name in ("state.json", "dataset_info.json") and any(file.parent.glob("*.arrow"))
    return saved_here or file.name == "dataset_infos.json"


def _saved_tables(folder: Path) -> set[str]:
    """The names of the tables that `datasets` saved to a folder; none for another folder."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return {file["filename"] for file in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def reading(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Reading:
    """What the records of `config` mean. Raises ConfigError for a tokenizer that cannot encode them."""
    if config.preferences:
        return Preferences(tokenizer, config.tokenizer, config.chat_template_kwargs, config.columns)
    if config.chat:
        given = (config.field, config.chat_template_kwargs, config.columns, config.train_on)
        return Dialogues(tokenizer, config.tokenizer, *given)
    if config.field == IDS:
        return TokenIds(tokenizer_size(tokenizer))
    return Texts(config.field or FIELD, encoder(tokenizer, config.tokenizer), special_tokens(tokenizer))


def check_source(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError if there are no files, or if this tokenizer cannot encode them or their first record."""
    sources, meaning = find_files(config)[0], reading(config, tokenizer)
    if config.malformed == "refuse":
        build.try_first(Job(sources, meaning, config.format is None, tokenizer_size(tokenizer), config.malformed))


def _build(
    folder: Path, config: DataConfig, sources: list[Source], tokenizer: PreTrainedTokenizerBase, quiet: bool
) -> None:
    """Write the cache entry into `folder`, and continue where an earlier build stopped."""
    meaning, size = reading(config, tokenizer), tokenizer_size(tokenizer)
    job = Job(sources, meaning, config.format is None, size, config.malformed, quiet)
    progress, contents = build.build(folder, job)
    skipped, first = progress.skipped, progress.first_skipped
    if not contents:
        left = f"; {skipped} are left out as malformed, the first: {first}" if skipped else ""
        raise ConfigError(f"data.path={config.path} holds no text: all of its documents are empty{left}")
    for remark in meaning.remarks(progress.counts):
        print(f"data.path={config.path}: {remark}", flush=True)
    if skipped:
        print(f"data.malformed=skip left out {skipped} records, the first: {first}", flush=True)
    made_of = {"path": config.path, "files": len(sources), "tokenizer": config.tokenizer, "skipped": skipped}
    cache.seal(folder, made_of | contents)


def _fingerprint(sources: list[Source], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that determines the tokens. st_ctime shows changes that keep size and st_mtime."""
    stats = []
    for file, form in sources:
        stat = file.stat()
        stats.append((str(file.resolve()), form, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    made_of = [cache.FORMAT, stats, config.malformed, meaning_of(config, tokenizer)]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def meaning_of(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All settings that determine the tokens and labels of a file of sound records, as JSON."""
    return [
        *(config.format is None, config.field or FIELD, config.columns),
        *(tokenizer_digest(tokenizer, config.chat), config.chat_template_kwargs, config.train_on, config.preferences),
    ]
