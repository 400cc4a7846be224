"""Formats: the records of one file, by its suffix or by `data.format`.

    text             the whole file is one record                       .txt, .md, .py, .html, ...
    jsonl            one JSON object per line                           .jsonl, .ndjson, .jsonlines
    json             an array of objects, or one object per line        .json
    csv, tsv         a header, then one record per row                  .csv, .tsv
    parquet          a table, one record per row                        .parquet
    arrow            the same, as `datasets` saves it to disk           .arrow

A record is a dictionary; records.py and chat.py say what it means. All but parquet and arrow are UTF-8, with or without
a byte order mark, and may be compressed (.gz, .bz2, .xz, .zst, .lz4). Other files are refused, with file and line:

    a suffix that is not in the table: read as text, braces or commas would become part of the documents
    NUL in a text: UTF-16 without a byte order mark has one beside each ASCII letter, and is valid UTF-8

Lines of JSON come unparsed, in blocks, so that the process that reads them is not the one that parses them.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from ringflash.data.text import BLOCK, blocks, compression_suffix, decoded, lines_of, located, opened
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
    "arrow": (".arrow",),
}
FORMATS = tuple(SUFFIXES)
ON_LINES = "a JSON object is expected on each line (data.format=json reads an array of objects, too)"
IN_ARRAY = "a JSON object is expected as each record"
ARROW_FILE = b"ARROW1"
POINTER = b"version https://git-lfs.github.com/spec/"  # begins what a clone without LFS has in place of a file
ROWS = 64  # of a table, read at once
LINES = 1 << 20  # bytes of lines of JSON, read at once
LONGEST = 1 << 28  # bytes of one of them: it is held whole, and parsed


class RecordError(ConfigError):
    """A record that cannot be used; the message names its file and line, record or row."""


Record = dict[str, Any]
Parsed = Iterator[tuple[str, "Record | RecordError"]]  # where in the file, and what is there or why it cannot be read
Records = Iterator[tuple[str, "Record | RecordError | Lines"]]


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are read.

    names: the fields that are read if a record has them. refusal: returns why a record with these fields cannot be
    used, or None.
    """

    names: tuple[str, ...]
    refusal: Callable[[Sequence[str]], str | None]


class Lines(NamedTuple):
    """Lines of a file of JSON objects, one per line. number: of the first, from 1; position: its byte in the file."""

    file: Path
    number: int
    position: int
    lines: list[bytes]

    def records(self, fields: Fields) -> Parsed:
        """The parsed records. Raises ConfigError for bytes that are not text."""
        position = self.position
        for number, line in enumerate(self.lines, self.number):
            where = f"{self.file} line {number}"
            text = decoded(line, where, position)
            position += len(line)
            if not text.strip():
                continue
            try:
                record = _json_record(_parsed(text, where, ON_LINES), fields, where, ON_LINES)
            except RecordError as error:
                yield where, error
            else:
                yield where, record


def known_format(file: Path) -> str | None:
    """The format that the suffix of a file names, in capitals or not; None for a suffix that is not in the table."""
    name = file.name.lower()
    suffix = Path(name.removesuffix(compression_suffix(file))).suffix
    return next((form for form, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def format_of(file: Path, chosen: str | None, asked: str | None, lists: bool) -> str:
    """The format to read a file by: `data.format`, or by its suffix.

    asked: the setting that asks for records, if one does. lists: the records hold lists. Raises ConfigError for an
    unknown suffix, and for a field where the format has none.
    """
    form = chosen or known_format(file)
    if lists and form in ("csv", "tsv"):
        raise ConfigError(f"{asked} is a list per record, but {file} is read as {form}; use jsonl or parquet")
    if form is None:
        raise ConfigError(
            f"{file}: the suffix {file.suffix or '(none)'} names no known format; set data.format to one of "
            f"{', '.join(FORMATS)}, or give the file a suffix such as .txt, .jsonl, .csv or .parquet"
        )
    if form == "text" and asked is not None:
        raise ConfigError(
            f"{asked} needs records, but {file} is read as text, which has none: set data.format to one of "
            f"{', '.join(FORMATS[1:])}, or leave out {asked}"
        )
    return form


def records(file: Path, form: str, fields: Fields, guessed: bool) -> Records:
    """The records of a file in order, each with its place; lines of JSON by blocks.

    guessed: the format is by the suffix. A text file that begins with JSON records is then refused. Raises ConfigError
    for a file that is not of its format; a single record that cannot be used is a RecordError in its place.
    """
    with open(file, "rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            raise ConfigError(f"{file} is a pointer of Git LFS, not the file itself: git lfs pull fetches that")
    reader = _guessed_text if form == "text" and guessed else _READERS[form]
    return reader(file, fields)


def _text(file: Path, fields: Fields) -> Records:
    yield str(file), {fields.names[0]: blocks(file)}


def _guessed_text(file: Path, fields: Fields) -> Records:
    rest = blocks(file)
    begin = next(rest, "")
    if (form := _json_records(begin)) is not None:
        raise ConfigError(
            f"{file} has the suffix of a text, but begins with JSON records: set data.format={form} to read their "
            f"data.field, or data.format=text to train on the file as it is"
        )
    yield str(file), {fields.names[0]: itertools.chain([begin], rest)}


def _json_records(text: str) -> str | None:
    """The format of a text that begins with a JSON object, or with an array of them; None for any other text.

    text: the first block of a file. An array that does not end in it is known by its first object.
    """
    begin = text.lstrip()
    if not begin.startswith(("{", "[")):
        return None
    if begin.startswith("[") and len(text) >= BLOCK // 4:  # a character has 4 bytes at most
        first = begin[1:].lstrip()
        return "json" if first.startswith("{") and _json_records(first) else None
    try:
        value, end = json.JSONDecoder().raw_decode(begin)
    except (ValueError, RecursionError):
        return None
    if begin[end:].lstrip(" \t\r,")[:1] not in ("", "\n", "{", "["):
        return None  # a sentence or a link that begins with a bracket
    if isinstance(value, list):
        return "json" if value and isinstance(value[0], dict) else None
    return "jsonl" if value else None


def _json_lines(file: Path, fields: Fields) -> Records:
    block = Lines(file, number=1, position=0, lines=[])
    size = 0
    with opened(file) as stream:
        for line in located(_held(stream), lambda count: f"{file} after line {count}"):
            block.lines.append(line)
            size += len(line)
            if size >= LINES:
                yield str(file), block
                block, size = Lines(file, block.number + len(block.lines), block.position + size, []), 0
    yield str(file), block


def _held(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file. Raises ValueError for one of more than LONGEST bytes, of which no more is held."""
    while line := stream.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise ValueError(
                f"the next line has more than {LONGEST} bytes; make its text a file of its own, which data.format=text "
                f"reads in blocks"
            )
        yield line


def _json(file: Path, fields: Fields) -> Records:
    with opened(file) as stream:
        begin = b""
        while not begin.strip(b"\xef\xbb\xbf \t\r\n") and (line := stream.readline(BLOCK)):
            begin = line
    if not begin.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_lines(file, fields)
        return
    for number, value in enumerate(_parsed("".join(blocks(file)), str(file), IN_ARRAY), 1):
        where = f"{file} record {number}"
        try:
            record = _json_record(value, fields, where, IN_ARRAY)
        except RecordError as error:
            yield where, error
        else:
            yield where, record


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f" at line {error.lineno}" if error.lineno > 1 and expected == IN_ARRAY else ""
        raise RecordError(f"{where} is not JSON: {error.msg}{place}; {expected}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of brackets
        raise RecordError(f"{where} is JSON that cannot be read: {reason(error)}") from error


class _Repeating(dict[str, Any]):
    """An object in which `key` occurs more than once; it holds the last value."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        value = _Repeating(value)
        value.key = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # json.loads would make one per line


def _repeated_key(record: dict[str, Any]) -> str | None:
    """A key that occurs more than once in the record, or in an object inside it."""
    rest: list[Any] = [record]
    while rest:
        value = rest.pop()
        if isinstance(value, _Repeating):
            return value.key
        if isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, list) and value and isinstance(value[0], dict | list):  # not token ids
            rest += value
    return None


def _json_record(value: Any, fields: Fields, where: str, expected: str) -> Record:
    if not isinstance(value, dict):
        raise RecordError(f"{where} holds a {type(value).__name__}; {expected}")
    if (key := _repeated_key(value)) is not None:
        raise RecordError(f"{where} has the key {key!r:.60} more than once in an object; keep one of them")
    if (refusal := fields.refusal(list(value))) is not None:
        raise RecordError(f"{where} {refusal}")
    return {name: value[name] for name in fields.names if name in value}


def _csv(file: Path, fields: Fields, delimiter: str = ",") -> Records:
    csv.field_size_limit(sys.maxsize)  # by default 131072 characters, less than a long document
    rows = csv.reader(lines_of(file), delimiter=delimiter, strict=True)
    try:
        header = next((row for row in rows if row), None)
        if header is None:
            return
        _require(fields, header, f"{file} line {rows.line_num}, the header,")
        columns = {name: header.index(name) for name in fields.names if name in header}
        for row in filter(None, rows):
            where = f"{file} line {rows.line_num}"
            if len(row) == len(header):
                yield where, {name: row[column] for name, column in columns.items()}
            else:
                message = f"{where} ends a record of {len(row)} columns; the header has {len(header)}"
                yield where, RecordError(message)
    except csv.Error as error:
        lone = "a carriage return without a line feed stands outside of quotes"
        message = lone if str(error).startswith("new-line character") else str(error)
        raise ConfigError(f"{file} line {rows.line_num} is not CSV: {message}") from error


def _parquet(file: Path, fields: Fields) -> Records:
    import pyarrow.parquet

    with open(file, "rb") as stream, pyarrow.parquet.ParquetFile(stream) as table:
        present = table.schema_arrow.names
        _require(fields, present, str(file))
        columns = [name for name in fields.names if name in present]
        yield from _rows(file, table.iter_batches(columns=columns, batch_size=ROWS), columns)


def _arrow(file: Path, fields: Fields) -> Records:
    import pyarrow.ipc

    with open(file, "rb") as stream:
        in_blocks = stream.read(len(ARROW_FILE)) == ARROW_FILE  # of Arrow's file format; datasets writes streams
        stream.seek(0)
        opened = (pyarrow.ipc.open_file if in_blocks else pyarrow.ipc.open_stream)(stream)
        _require(fields, opened.schema.names, str(file))
        columns = [name for name in fields.names if name in opened.schema.names]
        batches = map(opened.get_batch, range(opened.num_record_batches)) if in_blocks else opened
        yield from _rows(file, batches, columns)


def _rows(file: Path, batches: Iterable[Any], columns: Sequence[str]) -> Records:
    """The rows of a table's record batches."""
    number = 0
    for batch in located(batches, lambda _: f"{file} after row {number}"):  # noqa: B023 - the rows before an error
        for row in range(len(batch)):
            number += 1
            where = f"{file} row {number}"
            name = ""
            try:
                record = {}
                for name in columns:
                    record[name] = _without_nulls(batch.column(name)[row].as_py())
            except UnicodeDecodeError as error:
                message = f"{where} is not UTF-8: {error.reason} at byte {error.start} of its field {name}"
                yield where, RecordError(message)
            else:
                yield where, record


def _without_nulls(value: Any) -> Any:
    """A table's value without the keys that other rows' structures have: a table fills those with nulls."""
    if isinstance(value, dict):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    if isinstance(value, list) and any(isinstance(x, dict | list) for x in value):
        return [_without_nulls(x) for x in value]
    return value


_READERS: dict[str, Callable[[Path, Fields], Records]] = {
    "text": _text,
    "jsonl": _json_lines,
    "json": _json,
    "csv": _csv,
    "tsv": partial(_csv, delimiter="\t"),
    "parquet": _parquet,
    "arrow": _arrow,
}


def _require(fields: Fields, available: Sequence[str], where: str) -> None:
    if (refusal := fields.refusal(available)) is not None:
        raise ConfigError(f"{where} {refusal}")
    if doubled := [name for name in fields.names if list(available).count(name) > 1]:
        count = list(available).count(doubled[0])
        raise ConfigError(f"{where} has {count} fields of the name {doubled[0]}: one must have it")
