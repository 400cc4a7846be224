"""A text in pieces has the tokens of the whole, whatever the tokenizer and wherever its blocks end."""

import json

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from ringflash.data import formats, pieces, records
from ringflash.data.pieces import Piece
from ringflash.data.tokenizer import encoder, load_tokenizer
from ringflash.errors import ConfigError
from tests.data.cases import config, stored, texts_of
from tests.data.test_tokenizer import MADE, SPECIAL, bpe, byte_bpe, saved

WORDS = ["hello", "ab", "a", "b", "hello,", "\n", "  ab", "\t", "</s>", "é", "\n\n"]
SPACED = " ".join(np.random.default_rng(0).choice(WORDS, 3000))


def sentencepiece():
    """As Llama 2: the whole text is one word, which begins with a space that is added."""
    tokenizer = bpe(False)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def with_prefix():
    """As RoBERTa: a space is added before a text."""
    tokenizer = byte_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def chinese():
    """Characters without spaces, in pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["文字中文"], trainer)
    return tokenizer


CASES = {name: (make, SPACED) for name, make in MADE.items()} | {
    "SentencePiece": (sentencepiece, SPACED),
    "a space before": (with_prefix, SPACED),
    "no spaces": (chinese, "".join(np.random.default_rng(0).choice([*"文字中"], 6000))),
    "no spaces, whole text": (sentencepiece, "".join(np.random.default_rng(0).choice([*"hello"], 6000))),
}


@pytest.mark.parametrize("case", CASES)
def test_pieces_have_the_tokens_of_the_whole_text(tmp_path, monkeypatch, case):
    make, text = CASES[case]
    folder = saved(tmp_path / "tokenizer", make(), template="<s> $A </s>")
    monkeypatch.setattr(pieces, "PIECE", 1000)
    encode = encoder(load_tokenizer(folder), folder)
    found = [*pieces.pieces((text[i : i + 700] for i in range(0, len(text), 700)), encode.ids)]
    assert len(found) >= 5
    assert max(len(piece.text) for piece in found) <= 2000
    whole = encode([Piece(text)])[0].tolist()
    assert np.concatenate(encode(found)).tolist() == whole


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_document_in_pieces_is_one_document(tmp_path, monkeypatch, name):
    texts = ["café 😀 " * 300, "short"] if name == "a.jsonl" else ["café 😀 " * 300]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / name).write_text(lines if name == "a.jsonl" else texts[0], encoding="utf-8")
    for module in (pieces, records):
        monkeypatch.setattr(module, "PIECE", 512)
    monkeypatch.setattr(formats, "BLOCK", 7)  # ends inside of characters
    settings = config(tmp_path, tmp_path / name)
    assert texts_of(settings) == texts
    assert len(stored(settings)[1]) == len(texts) + 1


@pytest.mark.parametrize("damage", [b"\xff", b"\xf0\x9f", b"\x80\x80\x80\x80\x80"], ids=repr)
def test_a_block_that_is_not_utf_8_is_refused_with_the_byte_of_its_file(tmp_path, monkeypatch, damage):
    (tmp_path / "a.txt").write_bytes("é".encode() * 10 + damage)
    monkeypatch.setattr(formats, "BLOCK", 7)
    with pytest.raises(ConfigError, match=r"a\.txt is not UTF-8: .* at byte 20 "):
        texts_of(config(tmp_path, tmp_path / "a.txt"))


def test_a_long_array_of_json_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 64)
    (tmp_path / "a.txt").write_text(json.dumps([{"text": "a"}] * 99))
    with pytest.raises(ConfigError, match=r"begins with JSON records: set data\.format=json"):
        texts_of(config(tmp_path, tmp_path / "a.txt"))


def test_a_text_that_no_cut_leaves_as_it_is_is_refused(tmp_path, monkeypatch):
    for module in (pieces, records):
        monkeypatch.setattr(module, "PIECE", 512)
    (tmp_path / "a.txt").write_text("c" * 2000)
    threes = Tokenizer(models.WordLevel({"c" * i or "</s>": i for i in range(4)}))
    threes.pre_tokenizer = pre_tokenizers.Split(Regex("..."), "isolated")
    folder = saved(tmp_path / "tokenizer", threes, bos_token=None, pad_token=None, unk_token=None)
    with pytest.raises(ConfigError, match=r"a\.txt holds a text of more than 512 characters .* cannot take in pieces"):
        stored(config(tmp_path, tmp_path / "a.txt", tokenizer=folder))
