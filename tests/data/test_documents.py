"""The same texts give the same tokens from any format, once; and whatever is wrong with them is said in one line."""

import gzip
import os
import socket
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ringflash.data import DataConfig, documents, load_corpus, load_tokenizer, python_stdlib, tokenised
from ringflash.errors import ConfigError
from tests.data.cases import TEXTS, config, write_jsonl, write_parquet, write_texts
from tests.data.cases import documents as documents_of

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def write_tokenizer(folder, words=("one", "two"), eos="<eos>", bos=None):
    """A folder with a word-level Hugging Face tokenizer, which adds `bos` itself if it has one."""
    vocabulary = {word: i for i, word in enumerate(filter(None, ("<unk>", eos, bos, *words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}", special_tokens=[(bos, vocabulary[bos]), (eos, vocabulary[eos])]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos).save_pretrained(folder)
    return folder


def stored(settings):
    """Tokens and offsets in the cache."""
    folder = tokenised(settings)
    return np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "offsets.npy")


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


def test_empty_documents_and_nulls_are_dropped(tmp_path):
    expected = stored(config(tmp_path, write_texts(tmp_path / "full", ["a", "b"])))
    holes = ["", "a", None, "b", ""]
    for path in (
        write_texts(tmp_path / "holes", [text or "" for text in holes]),
        write_jsonl(tmp_path / "holes.jsonl", holes),
        write_parquet(tmp_path / "holes.parquet", holes),
    ):
        assert all(np.array_equal(a, b) for a, b in zip(expected, stored(config(tmp_path, path)), strict=True)), path


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
    monkeypatch.setattr(documents, "GROUP", 4)
    assert all(np.array_equal(a, b) for a, b in zip(whole, stored(config(tmp_path, tmp_path / "a.jsonl")), strict=True))


def test_nothing_reaches_for_the_network_or_the_home_folder(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/dev/null/home")
    write_texts(tmp_path / "text")
    write_jsonl(tmp_path / "text" / "a.jsonl")
    write_parquet(tmp_path / "text" / "a.parquet")
    train, held_out = load_corpus(config(tmp_path, tmp_path / "text"))
    assert len(train) + len(held_out) == 3 * len(TEXTS)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [
        tokenised(config(tmp_path, tmp_path / "text")).name
    ]


# -- tokenizers


@pytest.mark.parametrize("bos", [None, "<bos>"], ids=["eos appended", "tokenizer adds bos and eos"])
def test_a_hugging_face_folder_tokenises_and_ends_each_document_once(tmp_path, bos):
    folder = write_tokenizer(tmp_path / "tokenizer", bos=bos)
    settings = config(tmp_path, write_texts(tmp_path / "text", ["one two", "two"]), tokenizer=str(folder))
    tokenizer = load_tokenizer(settings)
    train, held_out = load_corpus(settings)
    start = [bos] if bos else []
    found = {tuple(tokenizer.convert_ids_to_tokens(ids)) for ids in documents_of((train, held_out))}
    assert found == {(*start, "one", "two", "<eos>"), (*start, "two", "<eos>")}
    assert train.vocabulary == train.tokenizer_size == len(tokenizer)


def test_a_vocabulary_above_65536_is_stored_in_four_bytes(tmp_path):
    words = [f"w{i}" for i in range(70000)]
    settings = config(
        tmp_path,
        write_texts(tmp_path / "text", ["w0 w69999", "w1"]),
        tokenizer=str(write_tokenizer(tmp_path / "tokenizer", words)),
    )
    tokens, _ = stored(settings)
    assert (tokens.dtype, tokens.max()) == (np.uint32, 70001)
    train, _ = load_corpus(settings)
    assert (train.vocabulary, train.tokenizer_size) == (70002, 70002)


# -- the cache


@pytest.fixture
def calls(monkeypatch):
    """The groups of texts that were tokenised."""
    groups, encode = [], documents._encode

    def counted(tokenizer, texts):
        groups.append(texts)
        return encode(tokenizer, texts)

    monkeypatch.setattr(documents, "_encode", counted)
    return groups


def test_the_second_load_does_not_tokenise_again(tmp_path, calls):
    settings = config(tmp_path, write_texts(tmp_path / "text"))
    first = documents_of(load_corpus(settings))
    assert len(calls) == 1
    assert documents_of(load_corpus(settings)) == first
    assert documents_of(load_corpus(config(tmp_path, tmp_path / "text", seed=3, held_out=0.5))) == first
    assert len(calls) == 1


def test_the_digest_is_of_the_tokens_wherever_they_lie(tmp_path):
    digests = {}
    for name, texts in (("a", None), ("b", None), ("c", "longer than it was")):
        folder = write_texts(tmp_path / name)
        if texts:
            (folder / "000.txt").write_text(texts)
        digests[name] = load_corpus(config(tmp_path, folder))[0].digest
    assert len(digests["a"]) == 16
    assert digests["a"] == digests["b"] != digests["c"]


@pytest.mark.parametrize("change", ["content", "time", "new file", "vocabulary", "eos", "field"])
def test_whatever_decides_the_tokens_makes_another_cache(tmp_path, change):
    folder, tokenizer = write_texts(tmp_path / "text"), tmp_path / "tokenizer"
    write_tokenizer(tokenizer, bos="<bos>")
    settings = {"tokenizer": str(tokenizer)}
    before = tokenised(config(tmp_path, folder, **settings))
    if change == "content":
        (folder / "000.txt").write_text("longer than it was")
    elif change == "time":
        os.utime(folder / "000.txt", ns=(1, 1))
    elif change == "new file":
        (folder / "new.txt").write_text("new")
    elif change == "vocabulary":
        write_tokenizer(tokenizer, words=("two", "one"), bos="<bos>")
    elif change == "eos":
        saved = tokenizer / "tokenizer_config.json"
        saved.write_text(saved.read_text().replace('"eos_token": "<eos>"', '"eos_token": "<bos>"'))
    else:
        settings["field"] = "body"
    assert tokenised(config(tmp_path, folder, **settings)) != before


@pytest.mark.parametrize("death", [KeyboardInterrupt, ConfigError], ids=["killed", "bad file"])
def test_a_build_that_dies_leaves_nothing_and_the_next_one_starts_over(tmp_path, monkeypatch, death):
    settings, encode = config(tmp_path, write_jsonl(tmp_path / "a.jsonl")), documents._encode
    monkeypatch.setattr(documents, "GROUP", 4)

    def dies(tokenizer, texts):
        if "2020-01-01" in texts:
            raise death
        return encode(tokenizer, texts)

    monkeypatch.setattr(documents, "_encode", dies)
    with pytest.raises(death):
        tokenised(settings)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(documents, "_encode", encode)
    assert len(documents_of(load_corpus(settings))) == len(TEXTS)


def test_what_a_kill_leaves_behind_is_not_taken_for_a_finished_cache(tmp_path, monkeypatch):
    settings = config(tmp_path, write_texts(tmp_path / "text"))
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryDirectory", lambda **where: nullcontext(tempfile.mkdtemp(**where)))
        patch.setattr(documents.np, "save", Mock(side_effect=KeyboardInterrupt))  # with all tokens written
        with pytest.raises(KeyboardInterrupt):
            tokenised(settings)
    [left] = (tmp_path / "cache").iterdir()
    assert {file.name for file in (left / "built").iterdir()} == {"tokens.npy"}
    assert len(documents_of(load_corpus(settings))) == len(TEXTS)


def test_a_builder_that_finishes_second_takes_the_first_ones_cache(tmp_path, monkeypatch):
    settings, encode = config(tmp_path, write_texts(tmp_path / "text")), documents._encode
    others = []

    def overtaken(tokenizer, texts):
        monkeypatch.setattr(documents, "_encode", encode)
        others.append(tokenised(settings))
        return encode(tokenizer, texts)

    monkeypatch.setattr(documents, "_encode", overtaken)
    assert [tokenised(settings)] == others == list((tmp_path / "cache").iterdir())
    assert len(documents_of(load_corpus(settings))) == len(TEXTS)


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
        "absolute pattern": ({"path": text, "files": ["/etc/*"]}, "data.files=['/etc/*'] must be patterns below data"),
        "only empty documents": ({"path": tmp_path / "void"}, "/void holds no text: all of its documents are empty"),
        "not utf-8": ({"path": tmp_path / "latin.txt"}, "latin.txt cannot be read: 'utf-8' codec can't decode"),
        "not parquet": ({"path": tmp_path / "junk.parquet"}, "junk.parquet cannot be read: Parquet magic bytes"),
        "broken json": (
            {"path": tmp_path / "broken.jsonl"},
            "broken.jsonl line 2 is not JSON: Expecting ',' delimiter",
        ),
        "a list": ({"path": tmp_path / "list.json"}, "list.json line 1 holds a list; a JSON object is expected"),
        "no such key": ({"path": body}, "body.jsonl line 1 has no field data.field=text; it has body"),
        "no such column": ({"path": table}, "b.parquet has no field data.field=text; it has body, number"),
        "not text, jsonl": ({"path": tmp_path / "number.jsonl"}, "number.jsonl: data.field=text holds int, not text"),
        "not text, parquet": ({"path": table, "field": "number"}, "data.field=number holds int, not text"),
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
        *(("path", ""), ("files", []), ("files", "*.txt"), ("files", [""]), ("field", ""), ("tokenizer", "")),
        *(("cache", ""), ("held_out", 1.0), ("held_out", -0.1), ("seed", -1), ("sequence_length", 1)),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError) as refused:
        DataConfig(**{"path": "x", key: value})
    assert str(refused.value).startswith(f"data.{key}={value} must be ")


# -- the configs


@pytest.mark.parametrize("name", ["stdlib", "text", "jsonl", "parquet"])
def test_every_config_holds_known_keys_and_makes_a_data_config(name):
    OmegaConf.register_new_resolver("python_stdlib", python_stdlib, replace=True)
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONFIGS / f"{name}.yaml"))
    assert OmegaConf.missing_keys(merged) == (set() if name == "stdlib" else {"path"})
    if name == "stdlib":
        settings = OmegaConf.to_object(merged)
        assert isinstance(settings, DataConfig)
        assert len(documents.find_files(settings)) > 300


def test_the_standard_library_loads(tmp_path):
    train, held_out = load_corpus(config(tmp_path, python_stdlib(), files=["json/*.py", "logging/*.py"]))
    assert (len(train), len(held_out)) == (7, 1)
    assert train.total > 200_000
    assert 2.5 < train.unigram_entropy() < 3.5
