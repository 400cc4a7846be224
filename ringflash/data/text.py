"""The text of a file: its bytes decompressed and decoded, in blocks or lines. Errors name the file and the byte."""

from __future__ import annotations

import codecs
import contextlib
import io
import itertools
import lzma
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar, cast

from ringflash.errors import ConfigError, reason

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4"}
MARKS = {  # UTF-32's begin with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
COMPRESSED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\0": ".xz"}  # what such files begin with
BLOCK = 1 << 22  # bytes of a text, read at once
Part = TypeVar("Part")


def blocks(file: Path) -> Iterator[str]:
    """The text of a file, in blocks."""
    position, left = 0, b""
    with opened(file) as stream:
        while read := stream.read(BLOCK):
            read = left + read
            last = read[-3:]  # which may hold the beginning of a character
            end = len(read) - len(last) + codecs.utf_8_decode(last, "ignore", False)[1]
            if end:
                yield decoded(read[:end], str(file), position)
            position, left = position + end, read[end:]
    if left:
        yield decoded(left, str(file), position)


def lines_of(file: Path) -> Iterator[str]:
    """The lines of a file, each with its line feed. Only "\\n" ends one: text may hold other separators."""
    position = 0
    with opened(file) as stream:
        for number, line in enumerate(located(stream, lambda count: f"{file} after line {count}"), 1):
            yield decoded(line, f"{file} line {number}", position)
            position += len(line)


def located(parts: Iterable[Part], where: Callable[[int], str]) -> Iterator[Part]:
    """The parts of a file. An error in reading one becomes a ConfigError that begins with where(parts before it)."""
    rest = iter(parts)
    for count in itertools.count():
        try:
            part = next(rest)
        except StopIteration:
            return
        except Exception as error:  # pyarrow and the codecs share no base class
            raise ConfigError(f"{where(count)} cannot be read: {reason(error)}") from error
        yield part


def decoded(read: bytes, where: str, position: int) -> str:
    """The text of some bytes, which begin at byte `position` of their file, without the file's byte order mark.

    Raises ConfigError, with `where`, for bytes that are not UTF-8, and for a NUL.
    """
    if position == 0 and (kind := next((kind for mark, kind in MARKS.items() if read.startswith(mark)), None)):
        raise ConfigError(f"{where} is {kind}, not UTF-8; iconv -f {kind} -t UTF-8 converts it")
    if position == 0 and (suffix := next((x for mark, x in COMPRESSED.items() if read.startswith(mark)), None)):
        raise ConfigError(f"{where} is compressed, and its name does not say so: give the file the suffix {suffix}")
    if (nul := read.find(b"\0")) >= 0:
        at = position + nul
        raise ConfigError(
            f"{where} holds a NUL at byte {at}, which no text has; if it is UTF-16 without a byte order mark, "
            f"iconv -f UTF-16{'LE' if at % 2 else 'BE'} -t UTF-8 converts it"
        )
    try:
        return read.decode("utf-8" if position else "utf-8-sig")
    except UnicodeDecodeError as error:
        at = position + len(read) - len(error.object) + error.start  # `object` lacks the mark
        byte = error.object[error.start]
        raise ConfigError(
            f"{where} is not UTF-8: {error.reason} at byte {at} (0x{byte:02x}); iconv -f ENCODING -t UTF-8 converts it"
        ) from error


@contextlib.contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """A stream of a file's bytes, decompressed."""
    import pyarrow

    compression = COMPRESSIONS.get(compression_suffix(file))
    with open(file, "rb") as stored:  # by Python: pyarrow takes no name that is not UTF-8
        if compression is None:
            yield stored
        elif compression == "xz":  # which pyarrow does not read
            with lzma.open(stored) as stream:
                yield cast(IO[bytes], stream)
        else:
            yield io.BufferedReader(pyarrow.input_stream(stored, compression=compression))


def compression_suffix(file: Path) -> str:
    """The suffix of a compressed file, in lower case; empty for other files."""
    suffix = file.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""
