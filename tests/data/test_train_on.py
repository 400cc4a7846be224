"""Which of the assistant's turns are trained on: by data.train_on, and by what a message says of itself."""

import dataclasses

import pytest

from ringflash.data import IGNORE, load_corpora, tokenised
from ringflash.data.config import WeightedSource
from ringflash.data.documents import cache_folder
from ringflash.data.formats import RecordError
from ringflash.errors import ConfigError
from tests.data.chat_cases import (
    CALL,
    MARKED,
    QWEN3,
    SMOLLM2,
    TEMPLATES,
    TOOL,
    chat,
    chat_tokenizer,
    settings,
    trained,
    write,
)

TURNS = [["hi", "hello"], ["hi", "no", "more?", "yes"], ["hi", "a", "b", "c", "d", " e"], ["x", "y", "unanswered"]]
AGENT = [
    {"role": "user", "content": "add"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
]
LENGTH = 512


def last_turns(tokenizer, conversations, marks):
    """A plain loop: tokens and labels of each conversation up to its last answer, which alone is labelled."""
    found = []
    for messages in conversations:
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        whole = tokenizer.apply_chat_template(
            messages if marks else messages[: last + 1], return_dict=True, return_assistant_tokens_mask=marks
        )
        asked = tokenizer.apply_chat_template(messages[:last], add_generation_prompt=True, return_dict=False)
        ids = whole["input_ids"]
        assert ids[: len(asked)] == asked
        learned = whole["assistant_masks"] if marks else [1] * len(ids)
        labels = [x if i >= len(asked) and learned[i] else IGNORE for i, x in enumerate(ids)]
        found.append((ids, labels[1:] + [IGNORE]))
    return sorted(found)


def packed(config):
    """Tokens and labels of each document in the sequences of an epoch, without the padding."""
    corpus, _ = load_corpora(config)
    found = []
    for index in range(2 if config.stream else corpus.epoch_length(LENGTH)):  # each streamed file fills one
        tokens, labels, lengths = corpus.packed(0, index, LENGTH)
        pieces = zip(tokens.split(lengths), labels.split(lengths), strict=True)
        found += [(x.tolist(), y.tolist()) for x, y in pieces if (y != IGNORE).any()]
    return sorted(found)


@pytest.mark.parametrize("stream", [False, True], ids=["cached", "streamed"])
@pytest.mark.parametrize("name", ["SmolLM2", "Qwen 3", "marked"])
def test_packed_labels_of_last_turns_are_those_of_a_plain_loop_over_the_template(tmp_path, name, stream):
    conversations = [chat(*turns) for turns in TURNS]
    if name == "Qwen 3":
        conversations.append(AGENT)
    (tmp_path / "text").mkdir()
    for file in "ab":
        write(tmp_path / "text", f"{file}.jsonl", [{"messages": messages} for messages in conversations])
    given = {"train_on": "last_turn", "held_out": 0.0, "sequence_length": LENGTH}
    config = settings(tmp_path, tmp_path / "text", TEMPLATES[name], **given, stream=stream)
    expected = last_turns(chat_tokenizer(TEMPLATES[name]), conversations * 2, name == "marked")
    for _ in range(2):  # the second time, from the cache
        assert packed(config) == expected


@pytest.mark.parametrize("stream", [False, True], ids=["cached", "streamed"])
def test_the_setting_decides_the_cache(tmp_path, stream):
    path = write(tmp_path, "a.jsonl", [{"messages": chat("hi", "no", "more?", "yes")}] * 2)
    given = {"held_out": 0.0, "sequence_length": LENGTH, "stream": stream}
    every = settings(tmp_path, path, **given)
    last = dataclasses.replace(every, train_on="last_turn")
    assert cache_folder(every) != cache_folder(last)
    digests = [load_corpora(config)[0].digest for config in (every, last, every)]
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_last_turn_is_the_last_of_all_turns(name):
    record = {"messages": chat("hi", "hello", "more?", "yes", "left unanswered")}
    [*_, spans] = trained(TEMPLATES[name], record)
    assert trained(TEMPLATES[name], record, train_on="last_turn") == [spans[-1:]]


IN_TWO = MARKED.replace("message.content + '<|im_end|>' }}{%- endgen", "message.content }}{%- endgen").replace(
    "{%- endgeneration %}", "{%- endgeneration %}{%- generation %}{{- '<|im_end|>' }}{%- endgeneration %}"
)


def test_several_generation_blocks_per_message_tell_the_last_turn_alone():
    messages = chat("hi", "hello", "more?", "yes")
    assert trained(IN_TWO, {"messages": messages}, train_on="last_turn") == [["yes", "<|im_end|>"]]
    messages[1]["train"] = False
    with pytest.raises(
        RecordError, match=r"train false, which need a generation block per message .* 4 blocks, for 2 m"
    ):
        trained(IN_TWO, {"messages": messages})
    prompts_otherwise = IN_TWO.replace("<|im_start|>assistant\\n' }}{%- endif", "<|im_start|>Assistant\\n' }}{%- endif")
    with pytest.raises(RecordError, match="renders the prompt for message 4 differently once that follows"):
        trained(prompts_otherwise, {"messages": messages}, train_on="last_turn")


def test_the_last_turn_of_a_completion_is_trained_on():
    messages = chat("hi", "hello", "more?", "yes")
    record = {"prompt": messages[:1], "completion": messages[1:]}
    assert trained(SMOLLM2, record) == [["hello<|im_end|>\n", "yes<|im_end|>\n"]]
    assert trained(SMOLLM2, record, train_on="last_turn") == [["yes<|im_end|>\n"]]


LEFT_OUT = [{"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}, {"trainable": False}]
FLAGS = [next(iter(flag)) for flag in LEFT_OUT]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("flag", LEFT_OUT, ids=FLAGS)
def test_an_answer_whose_flag_says_so_is_not_trained_on(name, flag):
    messages = chat("hi", "hello", "more?", "yes")
    [*_, spans] = trained(TEMPLATES[name], {"messages": messages})
    messages[0] |= flag
    messages[1] |= flag
    messages[3] |= dict.fromkeys(flag, True)
    [found] = trained(TEMPLATES[name], {"messages": messages})
    assert found == [span for span in spans if "yes" in span]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_flags_of_sharegpt_in_a_file_are_met(tmp_path, suffix):
    turns = [
        ("system", "Be kind.", None),
        ("human", "hi", 0.0),
        ("gpt", "no", 0.0),
        ("human", "x", 0.0),
        ("gpt", "y", 1.0),
    ]
    record = {"messages": [{"from": who, "value": text, "weight": weight} for who, text, weight in turns]}
    found = tokenised(settings(tmp_path, write(tmp_path, f"a.{suffix}", [record] * 2)))
    assert chat_tokenizer(SMOLLM2).decode(found.labels[found.labels != IGNORE]) == "y<|im_end|>\n" * 2


ANSWER = {"role": "assistant", "content": "yes"}
REFUSED = {
    "a user": ([{"role": "user", "content": "hi", "train": True}, ANSWER], "has train=True and the role user: only"),
    "text": ([*chat("hi"), ANSWER | {"train": "no"}], "has train='no'; it must be 0 or false (not trained on), or 1"),
    "flags that differ": (
        [*chat("hi"), ANSWER | {"weight": 1, "train": False}],
        "message 2 of messages has weight=1 and train=False, which contradict each other: keep one",
    ),
    "a part of a message": (
        [*chat("hi"), ANSWER | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}],
        "message 2 of messages has train_detail; only whole messages are left out",
    ),
    "a fraction": ([*chat("hi"), ANSWER | {"loss_scale": 0.5}], "has loss_scale; only whole messages are left out"),
    "only left out": ([*chat("hi"), ANSWER | {"train": False}], "has weight 0 or train false in all messages of the"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_cannot_be_met_are_refused(case):
    messages, message = REFUSED[case]
    with pytest.raises(RecordError) as refused:
        trained(QWEN3, {"messages": messages, "tools": [TOOL]})
    assert message in str(refused.value)


def test_a_last_turn_that_is_left_out_is_refused():
    messages = [*chat("hi", "hello", "more?"), ANSWER | {"weight": 0}]
    assert trained(SMOLLM2, {"messages": messages}) == [["hello<|im_end|>\n"]]
    with pytest.raises(RecordError, match=r"train false in the only one of data\.train_on=last_turn: there is nothing"):
        trained(SMOLLM2, {"messages": messages}, train_on="last_turn")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"chat": False, "packing": "cut"}, r"data\.train_on=last_turn is only read with data\.chat=true"),
        ({"preferences": True}, r"data\.train_on=last_turn must be all_turns: answers are compared whole"),
        ({"train_on": "last"}, r"data\.train_on=last must be all_turns or last_turn"),
    ],
    ids=["text", "preferences", "another value"],
)
def test_settings_without_last_turns_are_refused(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, tmp_path, **{"train_on": "last_turn"} | more)


def test_sources_have_their_own_turns(tmp_path):
    path = write(tmp_path, "a.jsonl", [{"messages": chat("hi", "hello", "more?", "yes")}])
    sources = {name: {"path": str(path), "train_on": turns} for name, turns in (("a", None), ("b", "last_turn"))}
    given = settings(tmp_path, path, held_out=0.0)
    config = dataclasses.replace(given, path=None, sources={name: WeightedSource(**x) for name, x in sources.items()})
    labels = [tokenised(part).labels for part in config.parts().values()]
    tokenizer = chat_tokenizer(SMOLLM2)
    spelled = [tokenizer.decode(x[x != IGNORE]) for x in labels]
    assert spelled == ["hello<|im_end|>\nyes<|im_end|>\n", "yes<|im_end|>\n"]
