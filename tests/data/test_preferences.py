"""A pair is a chosen and a rejected document, read as a prompt and its completion are, and packed side by side."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ringflash.data import IGNORE, batch, load_corpora, load_corpus, tokenised
from ringflash.data.config import WeightedSource
from ringflash.errors import ConfigError
from tests.data.chat_cases import GEMMA3, LLAMA3, MARKED, QWEN3, SMOLLM2, chat, chat_tokenizer, settings, write

TEXT = {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}
MESSAGES = {"prompt": chat("hi"), "chosen": chat("hi", "hello")[1:], "rejected": chat("hi", "no")[1:]}
WHOLE = {"chosen": chat("hi", "hello"), "rejected": chat("hi", "no")}


def pairs(tmp_path, records, template=SMOLLM2, **more):
    return settings(tmp_path, write(tmp_path, "a.jsonl", records), template, preferences=True, **more)


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3, GEMMA3, QWEN3, MARKED], ids=lambda x: str(len(x)))
def test_the_documents_of_a_pair_are_those_of_its_completions(tmp_path, template):
    found = tokenised(pairs(tmp_path, [TEXT, MESSAGES, WHOLE], template))
    halves = [
        {"prompt": record["prompt"], "completion": record[name]}
        for record in (TEXT, MESSAGES, MESSAGES)
        for name in ("chosen", "rejected")
    ]
    apart = tokenised(settings(tmp_path, write(tmp_path, "b.jsonl", halves), template))
    assert all(np.array_equal(a, b) for a, b in zip(found[:3], apart[:3], strict=True))
    assert found.starts.tolist() == [0, 2, 4]


def test_a_prompt_of_text_beside_messages_is_not_read_which_is_reported(tmp_path, capsys):
    found = tokenised(pairs(tmp_path, [WHOLE | {"prompt": "hi"}, WHOLE]))
    assert (
        "1 records have messages in chosen and rejected, and a text in prompt, which is not" in capsys.readouterr().out
    )
    assert np.array_equal(*found.tokens.reshape(2, -1))


@pytest.mark.parametrize("prompt", [[], chat("hi")], ids=["no message", "those of the answers"])
def test_messages_that_both_answers_begin_with_are_the_prompt_once(tmp_path, prompt):
    found = tokenised(pairs(tmp_path, [WHOLE | {"prompt": prompt}, WHOLE]))
    assert np.array_equal(*found.tokens.reshape(2, -1))


def test_the_answers_to_an_instruction_are_turns_for_the_chat_template(tmp_path):
    alpaca = {"question": "hi", "chosen": "hello", "rejected": "no", "system": "Be kind."}
    found = tokenised(pairs(tmp_path, [alpaca], columns={"instruction": "question"}))
    expected = tokenised(pairs(tmp_path, [MESSAGES | {"system": "Be kind."}]))
    assert np.array_equal(found.tokens, expected.tokens)


def test_an_answer_may_be_a_single_message(tmp_path):
    single = {"asked": MESSAGES["prompt"], **{name: MESSAGES[name][0] for name in ("chosen", "rejected")}}
    found = tokenised(pairs(tmp_path, [single], columns={"prompt": "asked"}))
    assert np.array_equal(found.tokens, tokenised(pairs(tmp_path, [MESSAGES])).tokens)


@pytest.mark.parametrize("record", [MESSAGES, WHOLE], ids=["with a prompt", "whole"])
def test_answers_may_be_messages_as_json_text(tmp_path, record):
    as_text = {name: json.dumps(value) for name, value in record.items()}
    found = tokenised(pairs(tmp_path, [as_text, record]))
    assert np.array_equal(*found.tokens.reshape(2, -1))


def test_answers_that_look_like_json_are_texts(tmp_path):
    corpus, _ = load_corpus(pairs(tmp_path, [TEXT | {"chosen": "[1]", "rejected": '{"a": 1}'}], held_out=0))
    first, second = corpus.halves(0)
    found = [chat_tokenizer(SMOLLM2).decode(corpus.document(0)[half]) for half in (first, second)]
    assert found == ["2 + 2 = [1]<eos>", '2 + 2 = {"a": 1}<eos>']


def test_an_empty_answer_is_reported_where_it_was_chosen_alone(tmp_path, capsys):
    empty = {"chosen": chat("hi", "hello"), "rejected": chat("hi", "")}
    tokenised(pairs(tmp_path, [empty, {"chosen": chat("hi", ""), "rejected": chat("hi", "no")}]))
    assert "1 conversations have an empty message of the assistant, which teaches" in capsys.readouterr().out


def test_pairs_are_packed_whole_side_by_side_and_held_out_together(tmp_path):
    records = [{"prompt": f"{i:02}" + "-" * (i % 7), "chosen": "c" * (1 + i % 5), "rejected": "r"} for i in range(40)]
    config = pairs(tmp_path, records, sequence_length=60, held_out=0.25, packing="whole")
    training, held_out = load_corpora(config)
    assert training.description(60)[0].startswith("training   30 pairs of ")
    tokenizer, seen = chat_tokenizer(SMOLLM2), []
    for corpus in (training, held_out):
        rows = batch(corpus, seed=0, step=0, batch_size=corpus.epoch_length(60), length=60)
        for tokens, labels, lengths in zip(rows.tokens, rows.labels, rows.documents, strict=True):
            pieces = [*zip(tokens.split(lengths), labels.split(lengths), strict=True)]
            real = [tokenizer.decode(x) for x, label in pieces if (label != IGNORE).any()]
            assert [x[:2] for x in real[::2]] == [x[:2] for x in real[1::2]]
            assert [x[-6] for x in real] == ["c", "r"] * (len(real) // 2)
            assert all((label == IGNORE).all() for _, label in pieces[len(real) :])
            seen += [int(x[:2]) for x in real[::2]]
    assert sorted(seen) == [*range(40)]


def test_pairs_are_streamed_and_mixed_as_documents_are(tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder", "a.jsonl", [TEXT, MESSAGES])
    common = {"preferences": True, "held_out": 0, "sequence_length": 128, "packing": "whole"}
    plain, _ = load_corpora(settings(tmp_path, tmp_path / "folder", **common))
    streamed, _ = load_corpora(settings(tmp_path, tmp_path / "folder", stream=True, **common))
    write(tmp_path, "b.jsonl", [WHOLE])
    sources = {name: WeightedSource(path=str(tmp_path / name)) for name in ("folder", "b.jsonl")}
    one = settings(tmp_path, tmp_path / "folder", **common)
    mixed, _ = load_corpora(replace(one, path=None, sources=sources))
    numbers = [i for i in range(2) if mixed.source_of(i) == "folder"]
    expected = plain.packed(0, 0, 128)
    for found in (streamed.packed(0, 0, 128), *(mixed.packed(0, i, 128) for i in numbers)):
        assert all(map(torch.equal, expected[:2], found[:2]))
        assert found.documents == expected.documents
    assert len(numbers) == 1


REFUSED = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, "a.jsonl line 2 has no rejected; it has prompt, chosen"),
    "neither": ({"prompt": "a"}, "a.jsonl line 2 has no chosen and no rejected; it has prompt"),
    "no prompt": (TEXT | {"prompt": None}, "line 2: prompt holds None, and chosen a text: it must be one too"),
    "an empty prompt": (TEXT | {"prompt": ""}, "line 2: prompt holds '', and chosen a text"),
    "an empty answer": (TEXT | {"rejected": ""}, "line 2: rejected has an empty completion, so there is nothing"),
    "null": (TEXT | {"rejected": None}, "line 2 holds '4' in chosen and None in rejected: both must be texts, or both"),
    "a text and messages": (TEXT | {"chosen": chat("a", "b")}, "both must be texts, or both lists of messages"),
    "the same": (TEXT | {"rejected": "4"}, "line 2 has the same chosen and rejected: there is nothing to prefer"),
    "the same messages": ({"chosen": chat("a", "b"), "rejected": chat("a", "b")}, "chosen has only messages that both"),
    "no shared message": ({"chosen": chat("a", "b"), "rejected": chat("c", "d")}, "prompt holds None, and chosen and"),
    "answers alone": (
        {"prompt": "hi", "chosen": chat("a", "b")[1:], "rejected": chat("a", "c")[1:]},
        "line 2: prompt holds 'hi', and chosen and rejected begin with no message in common: the messages of the",
    ),
    "a question": (
        MESSAGES | {"rejected": chat("what?")},
        "line 2: rejected has no message of the role assistant, but of user: there is nothing to learn",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_pair_that_cannot_be_compared_is_refused_with_its_line_or_left_out(tmp_path, case, capsys):
    record, message = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        tokenised(pairs(tmp_path, [TEXT, record, WHOLE]))
    assert message in str(refused.value)
    assert tokenised(pairs(tmp_path, [TEXT, record, WHOLE], malformed="skip")).contents["records"] == 2
    assert "data.malformed=skip left out 1 records, the first: " in capsys.readouterr().out


def test_an_answer_of_turns_that_the_template_renders_differently_is_refused(tmp_path):
    answer = chat("hi", "one", "more?", "two")[1:]
    record = {"prompt": chat("hi"), "chosen": answer, "rejected": answer[:1]}
    assert len(tokenised(pairs(tmp_path, [record], LLAMA3)).offsets) == 3
    with pytest.raises(ConfigError, match=r"line 1: chosen has several messages of the assistant, of which the chat"):
        tokenised(pairs(tmp_path, [record], QWEN3))


def test_pairs_longer_than_a_sequence_are_dropped_and_counted_and_refused_where_none_is_left(tmp_path):
    records = [TEXT, TEXT | {"prompt": "?" * 30}]
    training, _ = load_corpora(pairs(tmp_path, records, sequence_length=40, packing="whole", held_out=0))
    assert "; 1 longer than 40 tokens are dropped" in training.description(40)[0]
    assert training.epoch_length(40) == 1
    with pytest.raises(ConfigError, match=r"has no pair for training of at most data\.sequence_length=16 tokens, and .*"
                       r": give more pairs, a longer sequence$"):  # fmt: skip
        load_corpora(pairs(tmp_path, records, sequence_length=16, packing="whole", held_out=0))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"packing": "truncate"},
            r"data\.packing=truncate must be whole: the answers of a pair are neither cut",
        ),
        ({"packing": "cut"}, r"data\.packing=cut must be whole"),
        ({"chat": False}, r"data\.preferences=true: data\.chat=False must be true"),
        ({"field": "messages"}, r"data\.field=messages must be null: the fields are prompt, chosen and rejected"),
    ],
    ids=["truncate", "cut", "no chat", "field"],
)
def test_settings_that_pairs_cannot_have_are_refused(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, tmp_path, **{"preferences": True} | more)
