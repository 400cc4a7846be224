"""No text becomes a special token, whatever the tokenizer; each document has one end of document, and has it last."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ringflash.data import check_vocabulary, load_corpus, load_tokenizer
from ringflash.data.pieces import Piece
from ringflash.data.tokenizer import encoder
from ringflash.errors import ConfigError
from tests.data.cases import config, stored, write_texts, write_tokenizer
from tests.data.cases import documents as documents_of

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
CHARACTERS = sorted(set("".join(SPECIAL)) | set("abhello ▁"))
SPELLED = ["a </s> b", "</s>", "ab</s>", "ab </s>", "<s>a</s>", "<pad> <s>", "hello a"]


def bpe(ignore_merges):
    """Byte pairs; with ignore_merges, a word that is in the vocabulary is that token."""
    pieces = {piece: i for i, piece in enumerate([*SPECIAL, *CHARACTERS, "he", "ll"])}
    tokenizer = Tokenizer(models.BPE(pieces, [("h", "e"), ("l", "l")], unk_token="<unk>", ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def byte_bpe():
    """Byte pairs over bytes, trained."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["hello ab </s> ab"] * 9, trainer)
    return tokenizer


def unigram():
    """SentencePiece's way: the special tokens are pieces of the best score."""
    pieces = [(piece, 0.0) for piece in SPECIAL] + [(piece, -3.0 - i / 10) for i, piece in enumerate(CHARACTERS)]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("hello", -4.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def words(model):
    """Whole words, the special tokens among them."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "a", "b", "ab", "hello"])}
    tokenizer = Tokenizer(model(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


MADE = {
    "BPE": lambda: bpe(False),
    "BPE, whole words": lambda: bpe(True),
    "BPE of bytes": byte_bpe,
    "Unigram": unigram,
    "WordLevel": lambda: words(models.WordLevel),
    "WordPiece": lambda: words(models.WordPiece),
}
LOSSLESS = ("BPE", "BPE, whole words", "BPE of bytes", "Unigram")


def saved(folder, backend, eos="</s>", template=None, **settings):
    """The folder of a Hugging Face tokenizer; template: what it adds around a text."""
    if template:
        numbers = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>", "eos_token": eos}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, **names | settings)
    wrapped.save_pretrained(folder)
    return str(folder)


def encoded(folder, texts):
    """The tokenizer of a folder, and its tokens of each text."""
    tokenizer = load_tokenizer(folder)
    return tokenizer, [ids.tolist() for ids in encoder(tokenizer, folder)([*map(Piece, texts)])]


@pytest.mark.parametrize(
    "template", [None, "<s> $A", "<s> $A </s>", "$A </s>"], ids=["adds nothing", "bos", "both", "eos"]
)
@pytest.mark.parametrize("name", MADE)
def test_text_that_spells_a_special_token_stays_text_and_one_end_follows(tmp_path, name, template):
    folder = saved(tmp_path / "tokenizer", MADE[name](), template=template)
    tokenizer, documents = encoded(folder, SPELLED)
    special = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[1:]}
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin = [bos] if template and "<s>" in template else []
    for text, ids in zip(SPELLED, documents, strict=True):
        inside = ids[len(begin) : -1]
        assert ids == [*begin, *inside, eos], text
        assert special.isdisjoint(inside), text
        if name in LOSSLESS:
            assert tokenizer.decode(inside) == text
    assert documents[-1] == [*begin, *tokenizer("hello a", add_special_tokens=False)["input_ids"], eos]


@pytest.mark.parametrize("name", MADE)
def test_text_without_special_tokens_becomes_the_tokens_that_the_tokenizer_makes(tmp_path, name):
    folder = saved(tmp_path / "tokenizer", MADE[name]())
    texts = ["hello", "a b ab", "hello hello, unknown: é", " ", "\n"]
    tokenizer, documents = encoded(folder, texts)
    assert [ids[:-1] for ids in documents] == tokenizer(texts)["input_ids"]


def test_added_tokens_keep_their_numbers_and_only_special_ones_are_not_read(tmp_path):
    backend = unigram()
    backend.add_tokens(["<tool>", AddedToken("<|im_end|>", special=True), "<think>"])
    folder = saved(tmp_path / "tokenizer", backend, eos="<|im_end|>")
    tokenizer, [ids] = encoded(folder, ["<think>a<|im_end|>"])
    numbers = tokenizer.convert_tokens_to_ids(["<think>", "<|im_end|>"])
    assert (ids[-1], ids.count(numbers[1]), ids.count(numbers[0])) == (numbers[1], 1, 1)


def test_an_end_that_is_also_the_beginning_is_added_at_both(tmp_path):
    folder = saved(tmp_path / "tokenizer", byte_bpe(), template="</s> $A", bos_token="</s>")
    tokenizer, [ids] = encoded(folder, ["a"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["</s>", "a", "</s>"]


def test_a_tokenizer_that_was_saved_with_truncation_and_padding_gives_whole_documents(tmp_path):
    backend = byte_bpe()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    _, documents = encoded(saved(tmp_path / "tokenizer", backend), ["b" * 20, "a"])
    assert [len(ids) for ids in documents] == [21, 2]


def test_an_end_that_merges_make_is_spelled_by_its_parts(tmp_path):
    """As in tokenizers that were converted from SentencePiece: any two pieces that join to a third are a merge."""
    pieces = {piece: i for i, piece in enumerate([*SPECIAL, *CHARACTERS, "</", "s>", "</s>h"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("</s>", "h")]
    folder = saved(tmp_path / "tokenizer", Tokenizer(models.BPE(pieces, merges, unk_token="<unk>")))
    tokenizer, [ids] = encoded(folder, ["a</s>h</s>"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "</", "s>", "h", "</", "s>", "</s>"]


@pytest.mark.parametrize("name", ["BPE", "Unigram", "WordLevel"])
def test_an_end_that_is_a_character_of_text_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="has eos_token='a', which is ordinary text of its vocabulary"):
        encoded(saved(tmp_path / "tokenizer", MADE[name](), eos="a"), ["hello"])


@pytest.mark.parametrize("model", [models.WordLevel, models.WordPiece])
def test_a_tokenizer_whose_unknown_words_become_its_end_is_refused_where_a_word_is_unknown(tmp_path, model):
    folder = saved(tmp_path / "tokenizer", words(model), eos="<unk>", template="<s> $A")
    _, documents = encoded(folder, ["a b", "hello"])
    assert [ids.count(0) for ids in documents] == [1, 1]
    with pytest.raises(ConfigError, match="makes its eos_token=<unk> of ordinary text, so a document would end early"):
        encoded(folder, ["a é b"])


def test_a_text_that_a_tokenizer_cannot_encode_is_refused_with_its_name(tmp_path):
    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = saved(tmp_path / "tokenizer", backend, bos_token=None, pad_token=None, unk_token=None)
    assert encoded(folder, ["a a"])[1] == [[1, 1, 0]]
    with pytest.raises(ConfigError, match=f"^data.tokenizer={folder} cannot encode the text of data.path: WordLevel e"):
        encoded(folder, ["a b"])


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(tmp_path, monkeypatch):
    folder = Path(saved(tmp_path / "tokenizer", byte_bpe()))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | own))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ConfigError, match=f"^data.tokenizer={folder} holds no loadable tokenizer.* custom code"):
        encoded(str(folder), ["a"])


def test_a_padding_token_that_is_ordinary_text_stays_that(tmp_path):
    folder = saved(tmp_path / "tokenizer", byte_bpe(), pad_token="!")
    tokenizer, [ids] = encoded(folder, ["a!"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "!", "</s>"]


def test_a_tokenizer_in_python_splits_special_tokens_too_or_is_refused(tmp_path, monkeypatch):
    class Slow(ByT5Tokenizer):
        """Its text is bytes, and what is in `spelled` its eos."""

    slow, texts = Slow(), ["a </s>", "</s>"]
    monkeypatch.setattr(
        "ringflash.data.tokenizer.ByT5Tokenizer", type("Other", (), {})
    )  # so that its own reading is not taken
    for text, ids in zip(texts, encoder(slow, "slow")([*map(Piece, texts)]), strict=True):
        assert ids.tolist() == [*(byte + 3 for byte in text.encode()), slow.eos_token_id]
    monkeypatch.setattr(Slow, "_tokenize", lambda self, text: text.split())
    with pytest.raises(ConfigError, match=r"data\.tokenizer=slow: Slow makes its eos_token=</s> of text that"):
        encoder(slow, "slow")([*map(Piece, texts)])


@pytest.mark.parametrize("bos", [None, "<bos>"], ids=["eos appended", "tokenizer adds bos and eos"])
def test_a_hugging_face_folder_tokenises_and_ends_each_document_once(tmp_path, bos):
    folder = write_tokenizer(tmp_path / "tokenizer", bos=bos)
    settings = config(tmp_path, write_texts(tmp_path / "text", ["one two", "two"]), tokenizer=str(folder))
    tokenizer = load_tokenizer(settings.tokenizer)
    train, held_out = load_corpus(settings)
    start = [bos] if bos else []
    found = {tuple(tokenizer.convert_ids_to_tokens(ids)) for ids in documents_of((train, held_out))}
    assert found == {(*start, "one", "two", "<eos>"), (*start, "two", "<eos>")}
    assert train.vocabulary == len(tokenizer)


def test_a_token_id_above_65535_is_stored_in_four_bytes(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["model"]["vocab"]["two"] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    settings = config(tmp_path, write_texts(tmp_path / "text", ["one two", "one"]), tokenizer=str(folder))
    tokens, _ = stored(settings)
    assert (tokens.dtype, tokens.max()) == (np.uint32, 70_000)
    assert load_corpus(settings)[0].vocabulary == 70_001
    with pytest.raises(ConfigError, match=r"has 70001 tokens, more than the model's .*vocab_size=70000"):
        check_vocabulary(settings.tokenizer, load_tokenizer(settings.tokenizer), 70_000)
    check_vocabulary(settings.tokenizer, load_tokenizer(settings.tokenizer), 70_001)
