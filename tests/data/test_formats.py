"""Each file is read by its format, named or by suffix; what would be read as something else is refused."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow
import pytest

from ringflash.data import formats
from ringflash.data.formats import FORMATS, POINTER
from ringflash.errors import ConfigError
from tests.data.cases import config, texts_of, write_parquet

TEXTS = ["one", "zwei\r\nzeilen\n", '"quoted", with, commas\tand tabs', "naïve \u2028 café 😀", "x" * 200_000]
RECORDS = [{"id": i, "body": text} for i, text in enumerate(TEXTS)]


def table(delimiter):
    """The records as a CSV file with a header."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["id", "body"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return out.getvalue().encode()


def parquet(tmp_path):
    """The records as a parquet file."""
    return write_parquet(tmp_path / "made", TEXTS, field="body").read_bytes()


LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=1).encode()
MARK = b"\xef\xbb\xbf"


def texts(tmp_path, file, **settings):
    """The documents of a file, in order."""
    return texts_of(config(tmp_path, file, **settings))


def write(tmp_path, name, content):
    """A file with that content, compressed where its name says zstd."""
    file = tmp_path / name
    with pyarrow.output_stream(file, compression="zstd" if name.endswith(".zst") else None) as out:
        out.write(content)
    return file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES), ("a.ndjson", LINES), ("a.jsonlines", LINES), ("A.JSONL", LINES), ("a.json", LINES),
        ("a.ndjson.gz", gzip.compress(LINES[:40]) + gzip.compress(LINES[40:])), ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.zst", LINES), ("a.jsonl.xz", lzma.compress(LINES[:40]) + lzma.compress(LINES[40:])),
        ("a.json", ARRAY), ("a.json.gz", gzip.compress(MARK + ARRAY)),
        ("a.jsonl", MARK + LINES.replace(b"\n", b"\r\n")),
        ("a.csv", table(",")), ("a.CSV.gz", gzip.compress(MARK + table(","))), ("a.tsv", table("\t")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)  # fmt: skip
def test_records_are_read_by_their_suffix(tmp_path, name, content):
    assert texts(tmp_path, write(tmp_path, name, content), field="body") == TEXTS


@pytest.mark.parametrize("name", ["dump", "a.txt", "a.bak"])
@pytest.mark.parametrize(
    ("form", "content"),
    [("jsonl", LINES), ("json", ARRAY), ("csv", table(",")), ("tsv", table("\t")), ("parquet", None)],
    ids=["jsonl", "json", "csv", "tsv", "parquet"],
)
def test_the_format_may_be_named(tmp_path, name, form, content):
    file = write(tmp_path, name, content or parquet(tmp_path))
    assert texts(tmp_path, file, format=form, field="body") == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "A.MD", "a.html", "a.py", "a.txt.gz", "dump"])
def test_a_text_is_one_document_without_its_byte_order_mark(tmp_path, name):
    content = MARK + "{not json}\r\n[1] naïve </s>".encode()
    file = write(tmp_path, name, gzip.compress(content) if name.endswith(".gz") else content)
    form = {"format": "text"} if name == "dump" else {}
    assert texts(tmp_path, file, **form) == ["{not json}\r\n[1] naïve </s>"]


@pytest.mark.parametrize("text", ['{"a": 1} is a dict.\n', '[{"a": 1}](link)', "{} and {}", "[1] Reference"])
def test_a_text_that_only_begins_like_json_is_read(tmp_path, text):
    assert texts(tmp_path, write(tmp_path, "a.md", text.encode())) == [text]


def test_json_as_a_text_is_read_where_that_is_asked_for(tmp_path):
    assert texts(tmp_path, write(tmp_path, "a.jsonl", LINES), format="text") == [LINES.decode()]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "text"])
def test_a_file_without_any_text_is_refused(tmp_path, form):
    for content in (b"", MARK, b"body\n" if form in ("csv", "tsv") else b"", b"[]" if form == "json" else b""):
        with pytest.raises(ConfigError, match="holds no text: all of its documents are empty"):
            texts(tmp_path, write(tmp_path, "a", content), format=form, field=None if form == "text" else "body")


REFUSED = {
    "unknown suffix": (
        "a.xz",
        b"",
        {},
        "a.xz: the suffix .xz names no known format; set data.format to one of text, j",
    ),
    "no suffix": ("dump", b"text", {}, "dump: the suffix (none) names no known format; set data.format to one of"),
    "office": ("a.docx", b"text", {}, "the suffix .docx names no known format"),
    **{
        f"a pointer in {name}": (
            name,
            POINTER + b"v1\noid sha256:1\n",
            {},
            "is a pointer of Git LFS, not the file itself",
        )
        for name in ("a.txt", "a.jsonl", "a.parquet")
    },
    "compressed by another name": (
        "a.jsonl",
        gzip.compress(LINES),
        {},
        "line 1 is compressed, and its name does not say so: give the file the suffix .gz",
    ),
    "an archive": ("a.tar.gz", b"text", {}, "the suffix .gz names no known format"),
    "json lines as text": ("a.txt", b"\n" + LINES, {}, "begins with JSON records: set data.format=jsonl to read their"),
    "records on one line as text": ("a.txt", b'{"text": 1}, {"text": 2}', {}, "begins with JSON records"),
    "an array as text": (
        "a.md",
        ARRAY,
        {},
        "a.md has the suffix of a text, but begins with JSON records: set data.format=json ",
    ),
    "a field of a text": ("a.txt", b"text", {"field": "body"}, "data.field=body needs records, but "),
    "a field of text by name": (
        "a",
        b"text",
        {"field": "body", "format": "text"},
        "a is read as text, which has none: set",
    ),
    "not utf-8": ("a.txt", b"na\xefve", {}, "a.txt is not UTF-8: invalid continuation byte at byte 2 (0xef)"),
    "not utf-8 after a mark": ("a.txt", MARK + b"\xff", {}, "a.txt is not UTF-8: invalid start byte at byte 3 (0xff)"),
    "utf-16": (
        "a.txt",
        "naïve".encode("utf-16"),
        {},
        "a.txt is UTF-16, not UTF-8; iconv -f UTF-16 -t UTF-8 converts it",
    ),
    "utf-32": ("a.txt", "naïve".encode("utf-32"), {}, "is UTF-32, not UTF-8; iconv -f UTF-32 -t UTF-8 converts it"),
    "utf-16 without a mark": (
        "a.txt",
        "naive".encode("utf-16-le"),
        {},
        "a.txt holds a NUL at byte 1, which no text has; if it is UTF-16 without a byte order mark, iconv -f UTF-16LE ",
    ),
    "big-endian utf-16 in a line": (
        "a.jsonl",
        b'{"text": "a"}\n' + '{"text": "b"}\n'.encode("utf-16-be"),
        {},
        "a.jsonl line 2 holds a NUL at byte 14, which no text has; if it is UTF-16 without a byte order mark, iconv -f "
        "UTF-16BE",
    ),
    "a NUL in a zipped table": (
        "a.csv.gz",
        gzip.compress(b"text\na\0b\n"),
        {},
        "a.csv.gz line 2 holds a NUL at byte 6",
    ),
    "an escaped NUL": (
        "a.jsonl",
        b'{"text": "a\\u0000b"}',
        {},
        "a.jsonl line 1: data.field=text holds a NUL at character 1; remove it",
    ),
    "not utf-8 in a line": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "\xe9"}\n',
        {},
        "line 2 is not UTF-8: invalid continuation byte at byte 24",
    ),
    "not utf-8 in a table": (
        "a.csv",
        b"text\na\n\xff\n",
        {},
        "a.csv line 3 is not UTF-8: invalid start byte at byte 7",
    ),
    "a field that is missing later": (
        "a.jsonl",
        b'{"text": "a"}\n\n{"body": "b"}\n',
        {},
        "a.jsonl line 3 has no field data.field=text; it has body",
    ),
    "a field that is missing in an array": (
        "a.json",
        b'[{"text": "a"},\n{"body": "b"}]',
        {},
        "a.json record 2 has no field data.field=text",
    ),
    "a key that occurs twice": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b", "id": 1, "text": "c"}\n',
        {},
        "a.jsonl line 2 has the key 'text' more than once in an object",
    ),
    "a key that occurs twice inside a record of an array": (
        "a.json",
        b'[{"text": "a"},\n{"text": "b", "of": [{"id": [1], "name": 1, "name": 1}]}]',
        {},
        "a.json record 2 has the key 'name' more than once in an object",
    ),
    "a broken array": (
        "a.json",
        b'[{"text": "a"},\n{"text": "b"]',
        {},
        "a.json is not JSON: Expecting ',' delimiter at line 2",
    ),
    "an array in json lines": (
        "a.jsonl",
        b'["a"]',
        {},
        "a.jsonl line 1 holds a list; a JSON object is expected on each line",
    ),
    "an object over lines": (
        "a.json",
        b'{\n"text": "a"}',
        {},
        "a.json line 1 is not JSON: Expecting property name enclosed in double quotes; a JSON object is expected on ",
    ),
    "a long number": ("a.jsonl", b'{"text": "a"}\n' + b"1" * 5000, {}, "line 2 is JSON that cannot be rea"),
    "deep brackets": ("a.json", b"[" * 99999, {}, "a.json is JSON that cannot be read: maximum recursion depth"),
    "lines of a Mac": ("a.csv", b"text,id\ra,1\r", {}, "line 1 is not CSV: a carriage return without a line feed"),
    "no such column": (
        "a.csv",
        b"id,body\n1,a\n",
        {},
        "a.csv line 1, the header, has no field data.field=text; it has id, body",
    ),
    "another delimiter": ("a.csv", b"id;text\n1;a\n", {}, "the header, has no field data.field=text; it has id;text"),
    "no header": ("a.csv", b"1," + 500 * b"word " + b"\n", {}, "it has 1, " + 59 * "word " + "wo"),
    "pairs": ("a.jsonl", b'{"chosen": "a"}', {}, "it has chosen; data=preferences reads chosen"),
    "conversations": ("a.jsonl", b'{"messages": []}', {}, "it has messages; data=chat reads messages"),
    "token ids": ("a.jsonl", b'{"input_ids": []}', {}, "it has input_ids; data.field=input_ids reads input_ids"),
    "a short record": ("a.csv", b"id,text\n1,a\n2\n", {}, "a.csv line 3 ends a record of 1 columns; the header has 2"),
    "a long record": (
        "a.csv",
        b"id,text\n1,a\n2,b,c\n",
        {},
        "a.csv line 3 ends a record of 3 columns; the header has 2",
    ),
    "two columns of that name": (
        "a.csv",
        b"text,id,text\na,1,b\n",
        {},
        "line 1, the header, has 2 fields of the name text: one must",
    ),
    "an open quote": ("a.csv", b'text\n"a\nb\n', {}, "a.csv line 3 is not CSV: unexpected end of data"),
    "a truncated file": (
        "a.txt.gz",
        gzip.compress(LINES)[:-20],
        {},
        "a.txt.gz cannot be read: Truncated compressed stream",
    ),
    "truncated lines": (
        "a.jsonl.gz",
        gzip.compress(LINES)[:-20],
        {"field": "body"},
        "a.jsonl.gz after line 4 cannot be read: Truncated compressed stream",
    ),
    "not compressed": ("a.txt.gz", b"text", {}, "a.txt.gz cannot be read: zlib inflate failed"),
    "json lines as parquet": ("a.parquet", LINES, {}, "a.parquet cannot be read: Parquet magic bytes not found"),
    "text as json lines": ("a", b"plain\n", {"format": "jsonl"}, "a line 1 is not JSON: Expecting value"),
    "an unknown format": (
        "a.txt",
        b"",
        {"format": "xml"},
        f"data.format=xml must be null or one of {', '.join(FORMATS)}",
    ),
    "patterns as a path": (
        "*.txt",
        b"",
        {"file": "corpus/*.txt"},
        "data.path=corpus/*.txt does not exist; patterns belong",
    ),
}


def written_badly(content, damage):
    """A parquet file of 100 rows whose bytes `content` are replaced by `damage`."""
    out = io.BytesIO()
    column = pyarrow.array([f"row {i:03}" for i in range(100)])
    options = {"compression": "none", "use_dictionary": False, "row_group_size": 10, "write_statistics": False}
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), out, **options)
    assert out.getvalue().count(content) == 1
    return out.getvalue().replace(content, damage)


@pytest.mark.parametrize(
    ("content", "damage", "message"),
    [
        (b"row 070", b"row \xff70", "row 71 is not UTF-8: invalid start byte at byte 4 of its field text"),
        (b"row 071", b"row\x00071", "row 72: data.field=text holds a NUL at character 3"),
        (b"\x07\0\0\0row 090", b"\xff\xff\xff\x7frow 090", "after row 64 cannot be read: "),
    ],
)
def test_a_damaged_table_is_refused_with_the_row(tmp_path, content, damage, message):
    file = write(tmp_path, "a.parquet", written_badly(content, damage))
    with pytest.raises(ConfigError, match=rf"^{file} {message}"):
        texts(tmp_path, file)


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_does_not_fit_is_refused_with_file_and_place(tmp_path, case):
    name, content, settings, message = REFUSED[case]
    file = write(tmp_path, name, content)
    with pytest.raises(ConfigError) as refused:
        texts(tmp_path, **{"file": file} | settings)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_line_of_json_that_is_too_long_to_be_held_is_refused_with_its_place(tmp_path, monkeypatch, name):
    monkeypatch.setattr(formats, "LONGEST", 100_000)
    content = gzip.compress(LINES) if name.endswith(".gz") else LINES
    file = write(tmp_path, name, content)
    message = f"{file} after line 4 cannot be read: the next line has more than 100000 bytes; make its text a file"
    with pytest.raises(ConfigError, match=f"^{message}"):
        texts(tmp_path, file, field="body")
