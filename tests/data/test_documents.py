"""The same texts give the same tokens in any format, tokenised once; every fault is reported in one line."""

import gzip
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from omegaconf import OmegaConf
from transformers import ByT5Tokenizer

from ringflash.data import DataConfig, build, documents, load_corpus, load_tokenizer, python_stdlib
from ringflash.data.documents import check_source
from ringflash.errors import ConfigError
from tests.data.cases import (
    TEXTS,
    config,
    stored,
    texts_of,
    write_jsonl,
    write_parquet,
    write_texts,
    write_tokenizer,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


# -- what is read


def test_text_jsonl_and_parquet_give_the_same_tokens(tmp_path):
    text = stored(config(tmp_path, write_texts(tmp_path / "text")))
    for path in (write_jsonl(tmp_path / "a.jsonl"), write_parquet(tmp_path / "a.parquet")):
        other = stored(config(tmp_path, path))
        assert all(np.array_equal(a, b) for a, b in zip(text, other, strict=True)), path


def test_bytes_are_byt5s_with_an_eos_at_each_end_and_text_is_never_a_special_token(tmp_path):
    tokens, offsets = stored(config(tmp_path, write_texts(tmp_path / "text")))
    tokenizer = ByT5Tokenizer()
    assert tokens.dtype == np.uint16
    for i, text in enumerate(TEXTS):
        ids = tokens[offsets[i] : offsets[i + 1]].tolist()
        assert ids == [byte + 3 for byte in text.encode()] + [tokenizer.eos_token_id]
        assert tokenizer.decode(ids[:-1]) == text
        if "</s>" not in text:
            assert ids == tokenizer(text)["input_ids"]


def test_empty_documents_are_left_out_and_counted(tmp_path, capsys):
    expected = stored(config(tmp_path, write_texts(tmp_path / "full", ["a", "b"])))
    holes = ["", "a", "b", ""]
    assert "empty" not in capsys.readouterr().out
    for path in (
        write_texts(tmp_path / "holes", holes),
        write_jsonl(tmp_path / "holes.jsonl", holes),
        write_parquet(tmp_path / "holes.parquet", holes),
    ):
        assert all(np.array_equal(a, b) for a, b in zip(expected, stored(config(tmp_path, path)), strict=True)), path
        assert f"data.path={path}: 2 empty documents are left out" in capsys.readouterr().out


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_null_is_refused_with_its_place_or_left_out_and_counted(tmp_path, capsys, write):
    path = write(tmp_path / "a", ["a", None, "b"])
    form = write.__name__.removeprefix("write_")
    with pytest.raises(ConfigError, match=r"a (line|row) 2: data\.field=text holds null, not text"):
        stored(config(tmp_path, path, format=form))
    assert texts_of(config(tmp_path, path, format=form, malformed="skip")) == ["a", "b"]
    assert "data.malformed=skip left out 1 records, the first: " in capsys.readouterr().out


def test_a_folder_may_mix_formats_compression_and_odd_file_names(tmp_path):
    folder = write_texts(tmp_path / "mixed", ["plain"])
    write_jsonl(folder / "a [1]*.jsonl", ["json"])
    write_parquet(folder / "b.parquet", ["table"])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n\n{"text": "half \\ud800 pair"}\n'))
    (folder / "README.md").write_text("not asked for")
    settings = config(tmp_path, folder, files=["*.txt", "*.jsonl*", "*.parquet"], held_out=0)
    train, _ = load_corpus(settings)
    texts = {bytes(id - 3 for id in train.document(i)[:-1]).decode() for i in range(len(train))}
    assert texts == {"plain", "json", "table", "zipped", "half ? pair"}


def test_many_groups_of_documents_keep_their_order(tmp_path, monkeypatch):
    whole = stored(config(tmp_path, write_jsonl(tmp_path / "a.jsonl"), cache=str(tmp_path / "whole")))
    monkeypatch.setattr(build, "GROUP", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert all(np.array_equal(a, b) for a, b in zip(whole, stored(config(tmp_path, tmp_path / "a.jsonl")), strict=True))


def test_nothing_reaches_for_the_network_or_the_home_folder(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HOME", "/dev/null/home")
    write_texts(tmp_path / "text")
    write_jsonl(tmp_path / "text" / "a.jsonl")
    write_parquet(tmp_path / "text" / "a.parquet")
    train, held_out = load_corpus(config(tmp_path, tmp_path / "text"))
    assert len(train) + len(held_out) == 3 * len(TEXTS)
    assert len(list((tmp_path / "cache").iterdir())) == 1


# -- what is refused


def bad_inputs(tmp_path):
    """Name -> (settings, what the message says)."""
    text = write_texts(tmp_path / "text", ["a", "b"])
    (tmp_path / "empty").mkdir()
    write_texts(tmp_path / "void", ["", ""])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "junk.parquet").write_bytes(b"junk" * 10)
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    (tmp_path / "list.json").write_text('["a", "b"]')
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "not_a_tokenizer").mkdir()
    write_tokenizer(tmp_path / "endless", eos=None)
    (tmp_path / "file").write_text("")
    body, table = (
        write_jsonl(tmp_path / "body.jsonl", field="body"),
        write_parquet(tmp_path / "b.parquet", field="body"),
    )
    return {
        "no such path": ({"path": "/nowhere"}, "data.path=/nowhere does not exist"),
        "empty folder": ({"path": tmp_path / "empty", "files": ["*.txt"]}, "/empty data.files=['*.txt'] match no file"),
        "no match": ({"path": text, "files": ["*.md", "*.rst"]}, "data.files=['*.md', '*.rst'] match no file"),
        "absolute pattern": (
            {"path": text, "files": ["/etc/*"]},
            "data.files=['/etc/*'] must be a list of one or more patterns below",
        ),
        "only empty documents": ({"path": tmp_path / "void"}, "/void holds no text: all of its documents are empty"),
        "not utf-8": ({"path": tmp_path / "latin.txt"}, "latin.txt is not UTF-8: invalid continuation byte at byte 3"),
        "not parquet": ({"path": tmp_path / "junk.parquet"}, "junk.parquet cannot be read: Parquet magic bytes"),
        "broken json": (
            {"path": tmp_path / "broken.jsonl"},
            "broken.jsonl line 2 is not JSON: Expecting ',' delimiter",
        ),
        "a list": ({"path": tmp_path / "list.json"}, "list.json record 1 holds a str; a JSON object is expec"),
        "no such key": ({"path": body}, "body.jsonl line 1 has no field data.field=text; it has body"),
        "no such column": ({"path": table}, "b.parquet has no field data.field=text; it has body, number"),
        "not text, jsonl": ({"path": tmp_path / "number.jsonl"}, "number.jsonl line 1: data.field=text holds int, not"),
        "not text, parquet": ({"path": table, "field": "number"}, "row 1: data.field=number holds int, not text"),
        "no tokenizer": ({"path": text, "tokenizer": "/no/folder"}, "data.tokenizer=/no/folder is neither bytes nor"),
        "bad tokenizer": (
            {"path": text, "tokenizer": str(tmp_path / "not_a_tokenizer")},
            "holds no loadable tokenizer",
        ),
        "no eos": ({"path": text, "tokenizer": str(tmp_path / "endless")}, "has no eos_token, which must end each"),
        "no cache": ({"path": text, "cache": str(tmp_path / "file" / "cache")}, "/file/cache cannot be written"),
        "one document": ({"path": text / "000.txt"}, "000.txt holds 1 document, and data.held_out=0.05 keeps one"),
    }


CASES = [
    *("no such path", "empty folder", "no match", "absolute pattern", "only empty documents", "not utf-8"),
    *("not parquet", "broken json", "a list", "no such key", "no such column", "not text, jsonl", "not text, parquet"),
    *("no tokenizer", "bad tokenizer", "no eos", "no cache", "one document"),
]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line_that_names_it(tmp_path, case):
    settings, message = bad_inputs(tmp_path)[case]
    with pytest.raises(ConfigError) as refused:
        load_corpus(config(tmp_path, **settings))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_all_bad_inputs_are_tried(tmp_path):
    assert set(CASES) == set(bad_inputs(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("path", ""),
            ("files", []),
            ("files", "*.txt"),
            ("files", [""]),
            ("field", ""),
            ("tokenizer", ""),
            ("format", "xml"),
            ("malformed", "ignore"),
            ("packing", "greedy"),
        ),
        *(("cache", ""), ("held_out", 1.0), ("held_out", -0.1), ("seed", -1), ("sequence_length", 1)),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError) as refused:
        DataConfig(**{"path": "x", key: value})
    assert str(refused.value).startswith(f"data.{key}={value} must be ")


# -- the configs


@pytest.mark.parametrize("name", ["stdlib", "text", "jsonl", "csv", "parquet", "chat", "mixture"])
def test_every_config_holds_known_keys_and_makes_a_data_config(name):
    OmegaConf.register_new_resolver("python_stdlib", python_stdlib, replace=True)
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONFIGS / f"{name}.yaml"))
    assert (merged.path is None) == (name != "stdlib")
    if name == "stdlib":
        settings = OmegaConf.to_object(merged)
        assert isinstance(settings, DataConfig)
        assert len(documents.find_files(settings)[0]) > 300


def test_the_standard_library_loads(tmp_path):
    train, held_out = load_corpus(config(tmp_path, python_stdlib(), files=["json/*.py", "logging/*.py"]))
    assert (len(train), len(held_out)) == (7, 1)
    assert train.total > 200_000
    assert 2.5 < train.unigram_entropy() < 3.5


# -- malformed records


MALFORMED = [
    '{"text": "a"}',
    '{"text": 3}',
    "not json",
    '["a"]',
    '{"body": "b"}',
    '{"text": "\\u0000"}',
    '{"text": "z"}',
]


def test_malformed_records_are_left_out_and_counted_where_that_is_asked_for(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("\n".join(MALFORMED))
    assert texts_of(config(tmp_path, tmp_path / "a.jsonl", malformed="skip")) == ["a", "z"]
    printed = capsys.readouterr().out
    assert "data.malformed=skip left out 5 records, the first: " in printed
    assert "a.jsonl line 2: data.field=text holds int, not text" in printed


@pytest.mark.parametrize("line", MALFORMED[1:-1])
def test_a_malformed_record_is_refused_with_its_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f"{MALFORMED[0]}\n{line}\n{MALFORMED[-1]}\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl line 2"):
        texts_of(config(tmp_path, tmp_path / "a.jsonl"))


@pytest.mark.parametrize("line", ["", *MALFORMED])
def test_a_first_record_that_cannot_be_used_is_refused_before_anything_is_built(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f"{line}\n{MALFORMED[1]}\n" if line else "")
    checked = config(tmp_path, tmp_path / "a.jsonl")
    if line in MALFORMED[1:-1]:
        with pytest.raises(ConfigError, match=r"a\.jsonl line 1"):
            check_source(checked, load_tokenizer(checked.tokenizer))
    else:
        check_source(checked, load_tokenizer(checked.tokenizer))
    check_source(replace(checked, malformed="skip"), load_tokenizer(checked.tokenizer))
    assert not Path(checked.cache).exists()


def test_only_malformed_records_are_refused_with_the_first(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(MALFORMED[1:-1]))
    with pytest.raises(ConfigError, match=r"holds no text: .*; 5 are left out as malformed, the first: .* line 1"):
        texts_of(config(tmp_path, tmp_path / "a.jsonl", malformed="skip"))


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    table = datasets.Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})
    table.save_to_disk(tmp_path / "saved", num_shards=2)
    assert texts_of(config(tmp_path, tmp_path / "saved")) == TEXTS
    filtered = table.filter(lambda row: row["number"] % 2 == 0)
    filtered.save_to_disk(tmp_path / "filtered")
    assert texts_of(config(tmp_path, tmp_path / "filtered")) == TEXTS[::2]


def test_files_of_several_splits_are_refused_unless_data_files_names_them(tmp_path):
    for folder, names in (("flat", ("train-00000-of-00001", "test-00000-of-00001")), ("deep", ("train/a", "test/b"))):
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(tmp_path / folder / f"{name}.jsonl")
        with pytest.raises(
            ConfigError, match=r"holds the splits test, train of a data set: name .*\*\*/train\*"
        ) as error:
            texts_of(config(tmp_path, tmp_path / folder))
        suggested = json.loads(str(error.value).split("'")[1])
        assert texts_of(config(tmp_path, tmp_path / folder, files=suggested)) == TEXTS
    assert texts_of(config(tmp_path, tmp_path / "flat", files=["train*", "test*"])) == [*TEXTS, *TEXTS]
    (tmp_path / "flat" / "test-00000-of-00001.jsonl").rename(tmp_path / "flat" / "tests.jsonl")
    assert texts_of(config(tmp_path, tmp_path / "flat")) == [*TEXTS, *TEXTS]
    write_texts(tmp_path / "code" / "train")
    assert texts_of(config(tmp_path, write_texts(tmp_path / "code" / "test").parent)) == [*TEXTS, *TEXTS]


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: [main/test-*]
- config_name: other
  {other}
---
# A data set
"""


@pytest.mark.parametrize("other", ["data_files: other/*.jsonl", "data_dir: other"])
def test_files_of_several_configurations_are_refused_unless_data_files_names_them(tmp_path, other):
    for name in ("main", "other"):
        (tmp_path / "set" / name).mkdir(parents=True)
        write_jsonl(tmp_path / "set" / name / "train-00000-of-00001.jsonl")
    assert texts_of(config(tmp_path, tmp_path / "set")) == [*TEXTS, *TEXTS]
    (tmp_path / "set" / "README.md").write_text(CARD.replace("{other}", other))
    with pytest.raises(ConfigError, match=r"holds the configurations main, other of a data set \(README") as error:
        texts_of(config(tmp_path, tmp_path / "set"))
    suggested = json.loads(str(error.value).split("'")[1])
    assert suggested == ["main/train-*"]
    assert texts_of(config(tmp_path, tmp_path / "set", files=suggested)) == TEXTS
    assert texts_of(config(tmp_path, tmp_path / "set", files=["main/*", "other/*"])) == [*TEXTS, *TEXTS]
    for card in ("", "# no head", "---\nconfigs: 3\n---\n", "---\n: [\n---\n"):
        (tmp_path / "set" / "README.md").write_text(card)
        assert texts_of(config(tmp_path, tmp_path / "set")) == [*TEXTS, *TEXTS]


def test_a_folder_of_several_splits_is_refused_with_their_names(tmp_path):
    table = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"holds the splits train, test of a dataset: .*data\.path=.*saved/train"):
        texts_of(config(tmp_path, tmp_path / "saved"))
