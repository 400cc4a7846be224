"""The cache of tokens: two arrays and what is known of them, checked whenever they are loaded.

    tokens.npy    uint16, or uint32 for large vocabularies: all documents, end to end
    offsets.npy   int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]
    corpus.json   what they were made of, the vocabulary they use, a digest of them and a digest of itself

The digest covers each document's length and tokens, and nothing of where the text lies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ringflash.errors import reason

FORMAT = 3  # of the cache; to be raised when the same input gives other arrays
CONTENTS, TOKENS, OFFSETS = "corpus.json", "tokens.npy", "offsets.npy"


class DamagedError(Exception):
    """A cache that cannot be used; the message says what is wrong with which file."""


class Cache(NamedTuple):
    """A cache that was read: its arrays, memory-mapped, and corpus.json."""

    tokens: np.ndarray
    offsets: np.ndarray
    contents: dict[str, Any]


def write(folder: Path, documents: Iterable[np.ndarray], tokenizer_size: int, made_of: dict[str, Any]) -> None:
    """Write the documents' tokens into `folder`. They stream to disk; only their lengths are in memory."""
    dtype = np.dtype(np.uint16 if tokenizer_size <= 1 << 16 else np.uint32)
    lengths, highest, digest = [0], -1, hashlib.sha256()
    with open(folder / TOKENS, "wb") as out:
        _write_header(out, dtype, 0)
        for tokens in documents:
            written = tokens.astype(dtype)
            out.write(written.data)
            _add(digest, written)
            lengths.append(len(tokens))
            highest = max(highest, int(tokens.max()))
        out.seek(0)
        _write_header(out, dtype, sum(lengths))
    np.save(folder / OFFSETS, np.cumsum(lengths, dtype=np.int64))
    contents = made_of | {
        "format": FORMAT,
        "documents": len(lengths) - 1,
        "tokens": sum(lengths),
        "vocabulary": highest + 1,
        "tokenizer_size": tokenizer_size,
        "digest": digest.hexdigest()[:16],
    }
    sealed = contents | {"seal": _seal(contents)}
    (folder / CONTENTS).write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")


def read(folder: Path, verify: bool) -> Cache:
    """The cache in `folder`. Raises DamagedError if a file is missing, cannot be read, or is not as it was written.

    verify: also compare the tokens with their digest, which reads them all (about 1 GB per second).
    """
    contents = _contents(folder / CONTENTS)
    tokens, offsets = _array(folder / TOKENS), _array(folder / OFFSETS)
    expected = np.uint16 if contents["tokenizer_size"] <= 1 << 16 else np.uint32
    for name, array, dtype, length in (
        (TOKENS, tokens, expected, contents["tokens"]),
        (OFFSETS, offsets, np.int64, contents["documents"] + 1),
    ):
        if array.dtype != dtype or array.shape != (length,):
            raise DamagedError(f"{name} holds {array.dtype} {list(array.shape)}, not {np.dtype(dtype)} [{length}]")
    if verify:
        _verify(tokens, offsets, contents["digest"])
    return Cache(tokens, offsets, contents)


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


def _array(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except Exception as error:  # numpy lets its header parser's own errors through, such as tokenize.TokenError
        raise DamagedError(f"{file.name} cannot be read: {reason(error)}") from error


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
