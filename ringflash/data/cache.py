"""The cache of tokens: arrays and what is known of them, checked whenever they are loaded.

    tokens.npy    uint16, or uint32 for large vocabularies: all documents, end to end
    offsets.npy   int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]
    labels.npy    int32, as long as tokens.npy: what is to be predicted there, or -100; only if some document has labels
    starts.npy    int64 [records]: the first document of each record; only if some record has several
    corpus.json   what they were made of, the vocabulary they use, a digest of them and a digest of itself

The digest covers each document's length, tokens and labels, and nothing of where the text lies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ringflash.data.records import Document
from ringflash.errors import reason

FORMAT = 4  # of the cache; to be raised when the same input gives other arrays
CONTENTS, TOKENS, OFFSETS, LABELS, STARTS = "corpus.json", "tokens.npy", "offsets.npy", "labels.npy", "starts.npy"
BLOCK = 1 << 22  # labels copied or read at once


class DamagedError(Exception):
    """A cache that cannot be used; the message says what is wrong with which file."""


class Cache(NamedTuple):
    """A cache that was read: its arrays, memory-mapped, and corpus.json.

    labels: None where each token is its own label. starts: None where each document is a record.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None
    starts: np.ndarray | None
    contents: dict[str, Any]


def write(folder: Path, documents: Iterable[Document], tokenizer_size: int) -> dict[str, Any]:
    """Write the documents' arrays into `folder`, and return what `seal` completes.

    Tokens and labels stream to disk; only the documents' lengths are in memory.
    """
    dtype = np.dtype(np.uint16 if tokenizer_size <= 1 << 16 else np.uint32)
    lengths, starts, highest, digest = [0], [], -1, hashlib.sha256()
    with open(folder / TOKENS, "wb") as out, _Labels(folder / LABELS) as labels:
        _write_header(out, dtype, 0)
        header = out.tell()
        for number, document in enumerate(documents):
            written = document.tokens.astype(dtype)
            if document.labels is not None and not labels.begun:
                out.flush()
                labels.begin(_written(folder / TOKENS, dtype, header, sum(lengths)))
            out.write(written.data)
            if labels.begun:
                labels.add(document.tokens if document.labels is None else document.labels)
            _add(digest, written)
            lengths.append(len(written))
            if document.begins:
                starts.append(number)
            highest = max(highest, int(written.max()))
        out.seek(0)
        _write_header(out, dtype, sum(lengths))
    np.save(folder / OFFSETS, np.cumsum(lengths, dtype=np.int64))
    several = len(starts) < len(lengths) - 1
    if several:
        np.save(folder / STARTS, np.array(starts, np.int64))
    return {
        "documents": len(lengths) - 1,
        "records": len(starts),
        "tokens": sum(lengths),
        "vocabulary": highest + 1,
        "tokenizer_size": tokenizer_size,
        "digest": digest.hexdigest()[:16],
        "labels_digest": labels.digest.hexdigest()[:16] if labels.begun else None,
    }


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
    dtype = np.uint16 if contents["tokenizer_size"] <= 1 << 16 else np.uint32
    tokens = _array(folder / TOKENS, dtype, contents["tokens"])
    offsets = _array(folder / OFFSETS, np.int64, contents["documents"] + 1)
    labels = _array(folder / LABELS, np.int32, contents["tokens"]) if contents["labels_digest"] else None
    several = contents["records"] < contents["documents"]
    starts = _array(folder / STARTS, np.int64, contents["records"]) if several else None
    if verify:
        _verify(tokens, offsets, contents["digest"])
        if labels is not None and _digest_of(labels) != contents["labels_digest"]:
            raise DamagedError(f"{LABELS} has other contents than were written")
        if starts is not None and (starts[0] != 0 or (np.diff(starts) < 1).any()):
            raise DamagedError(f"{STARTS} does not divide the documents into records")
    return Cache(tokens, offsets, labels, starts, contents)


class _Labels:
    """labels.npy, begun with the first document that has labels; those before it are labelled with their tokens."""

    def __init__(self, file: Path) -> None:
        self.file, self.count, self.digest = file, 0, hashlib.sha256()
        self.out: IO[bytes] | None = None

    def __enter__(self) -> _Labels:
        return self

    @property
    def begun(self) -> bool:
        """Whether some document had labels."""
        return self.out is not None

    def begin(self, tokens: np.ndarray) -> None:
        """Create the file, with the tokens before as their own labels."""
        self.out = open(self.file, "wb")  # noqa: SIM115 - closed by __exit__
        _write_header(self.out, np.dtype(np.int32), 0)
        for begin in range(0, len(tokens), BLOCK):
            self.add(tokens[begin : begin + BLOCK])

    def add(self, labels: np.ndarray) -> None:
        """Append labels."""
        assert self.out is not None
        written = labels.astype(np.int32)
        self.out.write(written.data)
        self.digest.update(written.data)
        self.count += len(written)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.out is not None:
            self.out.seek(0)
            _write_header(self.out, np.dtype(np.int32), self.count)
            self.out.close()


def _written(file: Path, dtype: np.dtype, header: int, count: int) -> np.ndarray:
    """The first `count` elements of a file that is being written."""
    return np.memmap(file, dtype, "r", header, (count,)) if count else np.empty(0, dtype)  # no map is empty


def _digest_of(labels: np.ndarray) -> str:
    digest = hashlib.sha256()
    for begin in range(0, len(labels), BLOCK):
        digest.update(labels[begin : begin + BLOCK].data)
    return digest.hexdigest()[:16]


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
    digest = hashlib.sha256()
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        _add(digest, tokens[begin:end])
    if digest.hexdigest()[:16] != expected:
        raise DamagedError(f"{TOKENS} or {OFFSETS} has other contents than were written")


def _add(digest: Any, tokens: np.ndarray) -> None:
    digest.update(tokens.nbytes.to_bytes(8, "little"))
    digest.update(tokens)


def _seal(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def _write_header(out: Any, dtype: np.dtype, count: int) -> None:
    """The .npy header of a vector. Its size does not depend on `count`: numpy leaves room for the array to grow."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(out, header)
