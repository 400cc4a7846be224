"""Formats: the texts or token ids of one file, by its suffix or by `data.format`.

    text             the whole file is one document                     .txt, .md, .py, .html, ...
    jsonl            one JSON object per line, one document each        .jsonl, .ndjson, .jsonlines
    json             an array of objects, or one object per line        .json
    csv, tsv         a header, then one document per record             .csv, .tsv
    parquet          a table, one document per row                      .parquet

With data.field=input_ids, the records of jsonl, json and parquet hold token ids instead of text.

All but parquet are UTF-8, with or without a byte order mark, and may be compressed (.gz, .bz2, .xz, .zst, .lz4).
Refused, with file and line, record or row:

    a suffix that is not in the table: read as text, braces or commas would become part of the documents
    NUL in a text: UTF-16 without a byte order mark has one beside each ASCII letter, and is valid UTF-8
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np

from ringflash.errors import ConfigError, reason

SUFFIXES = {
    "text": (
        *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".log", ".html", ".htm", ".xml"),
        *(".yaml", ".yml", ".toml", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs"),
        *(".go", ".java", ".kt", ".js", ".ts", ".jsx", ".tsx", ".css", ".cs", ".swift", ".scala", ".rb"),
        *(".php", ".pl", ".lua", ".r", ".jl", ".hs", ".sh", ".sql"),
    ),
    "jsonl": (".jsonl", ".ndjson", ".jsonlines"),
    "json": (".json",),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet", ".pq"),
}
FORMATS = tuple(SUFFIXES)
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4"}
ON_LINES = "a JSON object is expected on each line (data.format=json reads an array of objects, too)"
IN_ARRAY = "a JSON object is expected as each record"
MARKS = {  # UTF-32's begin with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
FIELD = "text"  # read where data.field=null and the format has fields
IDS = "input_ids"  # the field of token ids
BESIDE = (IDS, "labels", "attention_mask")  # what Hugging Face's tokenised records hold

ROWS = 64  # of a table, read at once
Part = TypeVar("Part")
Found = Iterator[tuple[str, Any]]  # where in the file, and what is there: a text, unless the file is wrong


def known_format(file: Path) -> str | None:
    """The format that the suffix of a file names, in capitals or not; None for a suffix that is not in the table."""
    name = file.name.lower()
    suffix = Path(name.removesuffix(_compression_suffix(file))).suffix
    return next((form for form, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def format_of(file: Path, chosen: str | None, field: str | None) -> str:
    """The format to read a file by: `data.format`, or by its suffix.

    Raises ConfigError for an unknown suffix, and for a field where the format has none.
    """
    form = chosen or known_format(file)
    if field == IDS and form in ("csv", "tsv"):
        raise ConfigError(f"data.field={IDS} is a list per record, but {file} is read as {form}; use jsonl or parquet")
    if form is None:
        raise ConfigError(
            f"{file}: the suffix {file.suffix or '(none)'} names no known format; set data.format to one of "
            f"{', '.join(FORMATS)}, or give the file a suffix such as .txt, .jsonl, .csv or .parquet"
        )
    if form == "text" and field is not None:
        raise ConfigError(
            f"data.field={field} names a field, but {file} is read as text, which has none: set data.format to one of "
            f"{', '.join(FORMATS[1:])}, or data.field=null"
        )
    return form


def texts(file: Path, form: str, field: str, guessed: bool) -> Iterator[str]:
    """The texts of a file in order, empty ones among them.

    guessed: the format is by the suffix. A text file that begins with JSON records is then refused.
    """
    reader = _guessed_text if form == "text" and guessed else _READERS[form]
    for where, text in reader(file, field):
        if not isinstance(text, str | None):
            raise ConfigError(f"{where}: data.field={field} holds {type(text).__name__}, not text")
        if text and "\0" in text:
            raise ConfigError(f"{where}: data.field={field} holds a NUL at character {text.index(chr(0))}; remove it")
        yield text or ""


def token_ids(file: Path, form: str, size: int) -> Iterator[np.ndarray]:
    """The input_ids of a file's records in order, int64 [tokens], empty ones among them.

    size: of the tokenizer. Refused are ids that it does not have, labels other than input_ids, and padding: each token
    of a document is read and predicted.
    """
    for where, record in _READERS[form](file, IDS):
        ids = np.asarray(record[IDS] or [], np.int64) if _is_list_of_ids(record[IDS]) else None
        if ids is None:
            raise ConfigError(f"{where}: data.field={IDS} holds {record[IDS]!r:.60}, not a list of token ids")
        wrong = ids[(ids < 0) | (ids >= size)]
        if len(wrong):
            raise ConfigError(f"{where}: data.field={IDS} holds {wrong[0]}, and data.tokenizer has {size} tokens")
        if record.get("labels") not in (None, record[IDS]):
            raise ConfigError(f"{where} has labels other than its {IDS}, which are not supported: remove the field")
        if not all(record.get("attention_mask") or []):
            raise ConfigError(f"{where} has an attention_mask that hides tokens: remove the padding from its {IDS}")
        yield ids


def _is_list_of_ids(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(type(x) is int and abs(x) < 2**63 for x in value))


def _text(file: Path, field: str) -> Found:
    with _opened(file) as stream:
        yield str(file), _decoded(stream.read(), str(file), 0)


def _guessed_text(file: Path, field: str) -> Found:
    for where, text in _text(file, field):
        form = _json_records(text)
        if form is not None:
            raise ConfigError(
                f"{file} has the suffix of a text, but begins with JSON records: set data.format={form} to read their "
                f"data.field, or data.format=text to train on the file as it is"
            )
        yield where, text


def _json_records(text: str) -> str | None:
    """The format of a text that begins with a JSON object, or with an array of them; None for any other text."""
    begin = text.lstrip()
    if not begin.startswith(("{", "[")):
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(begin)
    except (ValueError, RecursionError):
        return None
    if begin[end:].lstrip(" \t\r,")[:1] not in ("", "\n", "{", "["):
        return None  # a sentence or a link that begins with a bracket
    if isinstance(value, list):
        return "json" if value and isinstance(value[0], dict) else None
    return "jsonl" if value else None


def _json_lines(file: Path, field: str) -> Found:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            where = f"{file} line {number}"
            yield where, _json_text(_parsed(line, where, ON_LINES), field, where, ON_LINES)


def _json(file: Path, field: str) -> Found:
    with _opened(file) as stream:
        begin = next((line for line in stream if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    if not begin.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_lines(file, field)
        return
    for _, text in _text(file, field):
        for number, record in enumerate(_parsed(text, str(file), IN_ARRAY), 1):
            where = f"{file} record {number}"
            yield where, _json_text(record, field, where, IN_ARRAY)


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f" at line {error.lineno}" if error.lineno > 1 and expected == IN_ARRAY else ""
        raise ConfigError(f"{where} is not JSON: {error.msg}{place}; {expected}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of brackets
        raise ConfigError(f"{where} is JSON that cannot be read: {reason(error)}") from error


def _json_text(record: Any, field: str, where: str, expected: str) -> Any:
    if not isinstance(record, dict):
        raise ConfigError(f"{where} holds a {type(record).__name__}; {expected}")
    _require(field, list(record), where)
    if field == IDS:
        return record
    text = record[field]  # JSON can escape half a surrogate pair, which no tokenizer takes
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text


def _csv(file: Path, field: str, delimiter: str = ",") -> Found:
    csv.field_size_limit(sys.maxsize)  # by default 131072 characters, less than a long document
    rows = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    try:
        header = next((row for row in rows if row), None)
        if header is None:
            return
        _require(field, header, f"{file} line {rows.line_num}")
        column = header.index(field)
        for row in rows:
            where = f"{file} line {rows.line_num}"
            if row and len(row) != len(header):
                raise ConfigError(f"{where} ends a record of {len(row)} columns; the header has {len(header)}")
            yield where, row[column] if row else ""
    except csv.Error as error:
        lone = "a carriage return without a line feed stands outside of quotes"
        message = lone if str(error).startswith("new-line character") else str(error)
        raise ConfigError(f"{file} line {rows.line_num} is not CSV: {message}") from error


def _tsv(file: Path, field: str) -> Found:
    return _csv(file, field, delimiter="\t")


def _parquet(file: Path, field: str) -> Found:
    import pyarrow.parquet

    with open(file, "rb") as stream, pyarrow.parquet.ParquetFile(stream) as table:
        _require(field, table.schema_arrow.names, str(file))
        number = 0
        columns = [name for name in table.schema_arrow.names if name in BESIDE] if field == IDS else [field]
        parts = table.iter_batches(columns=columns, batch_size=ROWS)
        for part in _located(parts, lambda count: f"{file} after row {count * ROWS}"):
            for row in range(len(part)):
                number += 1
                where = f"{file} row {number}"
                try:
                    record = {name: part.column(name)[row].as_py() for name in columns}
                    yield where, record if field == IDS else record[field]
                except UnicodeDecodeError as error:
                    raise ConfigError(
                        f"{where} is not UTF-8: {error.reason} at byte {error.start} of its data.field={field}"
                    ) from error


_READERS: dict[str, Callable[[Path, str], Found]] = {
    "text": _text,
    "jsonl": _json_lines,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
}


def _require(field: str, available: list[str], where: str) -> None:
    if field not in available:
        raise ConfigError(f"{where} has no field data.field={field}; it has {', '.join(available) or 'none'}")
    if available.count(field) > 1:
        raise ConfigError(f"{where} has {available.count(field)} fields data.field={field}: one must have that name")


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file, each with its line feed. Only "\\n" ends one: text may hold other separators."""
    position = 0
    with _opened(file) as stream:
        for number, line in enumerate(_located(stream, lambda count: f"{file} after line {count}"), 1):
            yield _decoded(line, f"{file} line {number}", position)
            position += len(line)


def _located(parts: Iterable[Part], where: Callable[[int], str]) -> Iterator[Part]:
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


def _decoded(read: bytes, where: str, position: int) -> str:
    """The text of some bytes, which begin at byte `position` of their file, without the file's byte order mark."""
    if position == 0 and (kind := next((kind for mark, kind in MARKS.items() if read.startswith(mark)), None)):
        raise ConfigError(f"{where} is {kind}, not UTF-8; iconv -f {kind} -t UTF-8 converts it")
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
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed."""
    import pyarrow

    compression = COMPRESSIONS.get(_compression_suffix(file))
    with open(file, "rb") as stored:  # by Python: pyarrow takes no name that is not UTF-8
        if compression is None:
            yield stored
        elif compression == "xz":  # which pyarrow does not read
            with lzma.open(stored) as stream:
                yield cast(IO[bytes], stream)
        else:
            yield io.BufferedReader(pyarrow.input_stream(stored, compression=compression))


def _compression_suffix(file: Path) -> str:
    suffix = file.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""
