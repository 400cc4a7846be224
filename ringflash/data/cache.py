"""The token cache: arrays and their description, which are checked whenever they are loaded.

    tokens.npy    uint16, or uint32 for large vocabularies: all documents, end to end
    offsets.npy   int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]
    labels.npy    int32, as long as tokens.npy: the token to predict, or -100; only if some document has labels
    starts.npy    int64 [records]: the first document of each record; only if some record has several
    corpus.json   the sources of the arrays, the vocabulary they use, their digest and a digest of this file itself

The digest covers tokens, labels and the ends of documents, but not the location of the text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ringflash.data.records import Document
from ringflash.errors import reason

FORMAT = 14  # of the cache; increase it when the same input gives other arrays, or when parts are counted differently
CONTENTS, TOKENS, OFFSETS, LABELS, STARTS = "corpus.json", "tokens.npy", "offsets.npy", "labels.npy", "starts.npy"
LENGTHS, FLAGS = "lengths", "flags"  # int64 [pieces] and bool [pieces, begins and ends]: while it is written
HEADER = 128  # bytes of a vector's .npy header: numpy leaves room for the array to grow
BLOCK = 1 << 22  # elements copied or read at once


class DamagedError(Exception):
    """A cache that cannot be used; the message says what is wrong with which file."""


class Cache(NamedTuple):
    """A cache that was read: its arrays, memory-mapped, and corpus.json.

    labels: None if each token is its own label. starts: None if each document is a record.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None
    starts: np.ndarray | None
    contents: dict[str, Any]


class Group(NamedTuple):
    """Documents end to end, or pieces of them.

    tokens: [n], of the cache's type. labels: int32 [n], None if each token is its own. lengths: int64 [pieces].
    begins, ends: bool [pieces], whether a piece begins its record, ends its document.
    """

    tokens: np.ndarray
    labels: np.ndarray | None
    lengths: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


def grouped(documents: Iterable[Document], tokenizer_size: int) -> Group:
    """The documents as a group."""
    found = list(documents)
    tokens = np.concatenate([np.empty(0, np.int64), *(x.tokens for x in found)])
    labelled = any(x.labels is not None for x in found)
    labels = [x.tokens.astype(np.int32) if x.labels is None else x.labels for x in found] if labelled else None
    return Group(
        tokens.astype(token_type(tokenizer_size)),
        None if labels is None else np.concatenate(labels),
        np.array([len(x.tokens) for x in found], np.int64),
        np.array([x.begins for x in found], bool),
        np.array([x.ends for x in found], bool),
    )


def token_type(tokenizer_size: int) -> np.dtype:
    """The type of the tokens of a tokenizer of that size."""
    return np.dtype(np.uint16 if tokenizer_size <= 1 << 16 else np.uint32)


@dataclasses.dataclass
class Written:
    """What a writer has written: tokens, pieces of documents, the highest token id, whether there are labels."""

    tokens: int = 0
    pieces: int = 0
    highest: int = -1
    labelled: bool = False


class Writer:
    """Appends groups to what was `written` before, and truncates anything else in the files.

    While writing, the lengths and flags of pieces are in files too, so nothing is kept in memory. To continue, it only
    needs the number of bytes of each file.
    """

    def __init__(self, folder: Path, tokenizer_size: int, written: Written) -> None:
        self.folder, self.size, self.written = folder, tokenizer_size, written
        self._opened = contextlib.ExitStack()
        self._tokens = self._open(TOKENS, HEADER + written.tokens * token_type(tokenizer_size).itemsize)
        self._lengths = self._open(LENGTHS, written.pieces * 8)
        self._flags = self._open(FLAGS, written.pieces * 2)
        self._labels = self._open(LABELS, HEADER + written.tokens * 4) if written.labelled else None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: Any) -> None:
        self._opened.close()

    def add(self, group: Group) -> None:
        """Append a group."""
        written = self.written
        if group.labels is not None and self._labels is None:
            self._label()
        self._tokens.write(group.tokens.data)
        self._lengths.write(group.lengths.data)
        self._flags.write(np.stack([group.begins, group.ends], 1).tobytes())
        if self._labels is not None:
            labels = group.tokens.astype(np.int32) if group.labels is None else group.labels
            self._labels.write(labels.data)
        written.tokens += len(group.tokens)
        written.pieces += len(group.lengths)
        written.highest = max(written.highest, int(group.tokens.max(initial=0)))

    def sync(self) -> None:
        """Return when all is on the disk."""
        for file in filter(None, (self._tokens, self._lengths, self._flags, self._labels)):
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> dict[str, Any]:
        """Complete the cache's files, and return what `seal` completes."""
        tokens = self._finish(self._tokens, token_type(self.size))
        labels = None if self._labels is None else self._finish(self._labels, np.dtype(np.int32))
        self._opened.close()
        lengths = np.fromfile(self.folder / LENGTHS, np.int64)
        begins, ends = np.fromfile(self.folder / FLAGS, bool).reshape(-1, 2).T
        offsets = np.append(0, lengths.cumsum()[ends])
        starts = np.flatnonzero(begins[np.append(True, ends[:-1])])
        np.save(self.folder / OFFSETS, offsets)
        if len(starts) < len(offsets) - 1:
            np.save(self.folder / STARTS, starts)
        (self.folder / LENGTHS).unlink()
        (self.folder / FLAGS).unlink()
        return {
            "documents": len(offsets) - 1,
            "records": len(starts),
            "tokens": self.written.tokens,
            "vocabulary": self.written.highest + 1,
            "tokenizer_size": self.size,
            "digest": _digest(tokens, offsets),
            "labels_digest": None if labels is None else _digest(labels),
        }

    def _open(self, name: str, size: int) -> IO[bytes]:
        """A file, cut off behind `size` bytes, to be written from there."""
        (self.folder / name).touch()
        file = self._opened.enter_context(open(self.folder / name, "r+b"))  # noqa: SIM115
        file.truncate(size)
        file.seek(size)
        return file

    def _label(self) -> None:
        """Create the file of labels, with the tokens before as their own labels."""
        self._tokens.flush()
        self._labels = self._open(LABELS, HEADER)
        before = self._array(TOKENS, token_type(self.size))
        for begin in range(0, len(before), BLOCK):
            self._labels.write(before[begin : begin + BLOCK].astype(np.int32).data)
        self.written.labelled = True

    def _finish(self, file: IO[bytes], dtype: np.dtype) -> np.ndarray:
        """The array of a file, whose header is written."""
        file.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (self.written.tokens,)}
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == HEADER
        file.flush()
        return self._array(Path(file.name).name, dtype)

    def _array(self, name: str, dtype: np.dtype) -> np.ndarray:
        count = self.written.tokens  # no map is empty
        return np.memmap(self.folder / name, dtype, "r", HEADER, (count,)) if count else np.empty(0, dtype)


def seal(folder: Path, contents: dict[str, Any]) -> None:
    """Write corpus.json, without which a folder is no cache."""
    contents = contents | {"format": FORMAT}
    sealed = contents | {"seal": _seal(contents)}
    (folder / CONTENTS).write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")


def read(folder: Path, verify: bool) -> Cache:
    """The cache in `folder`. Raises DamagedError if a file is missing, cannot be read, or is not as it was written.

    verify: also compare tokens and labels with their digest, which reads them all (about 1 GB per second).
    """
    contents = _contents(folder / CONTENTS)
    tokens = _array(folder / TOKENS, token_type(contents["tokenizer_size"]), contents["tokens"])
    offsets = _array(folder / OFFSETS, np.int64, contents["documents"] + 1)
    labels = _array(folder / LABELS, np.int32, contents["tokens"]) if contents["labels_digest"] else None
    several = contents["records"] < contents["documents"]
    starts = _array(folder / STARTS, np.int64, contents["records"]) if several else None
    if verify:
        _verify(tokens, offsets, contents["digest"])
        if labels is not None and _digest(labels) != contents["labels_digest"]:
            raise DamagedError(f"{LABELS} has other contents than were written")
        if starts is not None and (starts[0] != 0 or (np.diff(starts) < 1).any()):
            raise DamagedError(f"{STARTS} does not divide the documents into records")
    return Cache(tokens, offsets, labels, starts, contents)


def _digest(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        for begin in range(0, len(array), BLOCK):
            found.update(array[begin : begin + BLOCK].data)
    return found.hexdigest()[:16]


def _contents(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{file.name} cannot be read: {reason(error)}") from error
    if not isinstance(contents, dict):
        raise DamagedError(f"{file.name} holds a {type(contents).__name__}, not an object")
    if contents.get("format") != FORMAT:
        raise DamagedError(f"{file.name} has format {contents.get('format')}, not {FORMAT}")
    if contents.pop("seal", None) != _seal(contents):
        raise DamagedError(f"{file.name} has other contents than were written")
    return contents


def _array(file: Path, dtype: Any, length: int) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except Exception as error:  # numpy lets its header parser's own errors through, such as tokenize.TokenError
        raise DamagedError(f"{file.name} cannot be read: {reason(error)}") from error
    if array.dtype != dtype or array.shape != (length,):
        raise DamagedError(f"{file.name} holds {array.dtype} {list(array.shape)}, not {np.dtype(dtype)} [{length}]")
    return array


def _verify(tokens: np.ndarray, offsets: np.ndarray, expected: str) -> None:
    if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 0).any():
        raise DamagedError(f"{OFFSETS} does not divide {len(tokens)} tokens into documents")
    if _digest(tokens, offsets) != expected:
        raise DamagedError(f"{TOKENS} or {OFFSETS} has other contents than were written")


def _seal(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]
