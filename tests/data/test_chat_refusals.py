"""Records, templates, settings and tokenizers that conversations cannot be trained from are refused by name."""

import pytest

from ringflash.data import tokenised
from ringflash.data.formats import RecordError
from ringflash.errors import ConfigError
from tests.data.cases import write_tokenizer
from tests.data.chat_cases import (
    ALPACA,
    CALL,
    GEMMA3,
    QWEN3,
    QWEN35,
    R1,
    RECORDS,
    SMOLLM2,
    chat,
    dialogues,
    settings,
    trained,
    write,
)

REFUSED = {
    "no messages": (
        {"text": "a"},
        "a.jsonl line 2 has neither messages nor prompt and completion nor instruction and output; it has text: data.f",
    ),
    "another field of messages": (
        {"conversation": []},
        "it has conversation: data.field=conversation reads conversatio",
    ),
    "an answer that is no text": ({"instruction": "hi", "output": 2}, "line 2: output holds 2, not text"),
    "an answer that is null": ({"instruction": "hi", "output": None}, "line 2: output holds None, not text"),
    "an instruction that is null": ({"instruction": None, "output": "x"}, "line 2: instruction holds None, not text"),
    "a history with null": (
        {**ALPACA, "history": [["hi", None]]},
        "line 2: history holds [['hi', None]], not a list of",
    ),
    "a prompt of text and messages": (
        {"prompt": "hi", "completion": chat("hi", "no")[1:]},
        "line 2 holds 'hi' in prompt and [{'role': 'assistant', 'content': 'no'}] in completion: both must be texts",
    ),
    "a completion that is not wanted": (
        {"prompt": "hi", "completion": "no", "label": False},
        "line 2 has label=false, for a completion that is not wanted: KTO is not supported",
    ),
    "variables that are a list": (
        {"messages": chat("hi", "hello"), "chat_template_kwargs": [1]},
        "line 2: chat_template_kwargs holds [1], not names with values",
    ),
    "a history of texts": ({**ALPACA, "history": ["hi"]}, "line 2: history holds ['hi'], not a list of pairs"),
    "text": ({"messages": "hi"}, "line 2: messages holds 'hi', not a list of messages with role and content"),
    "null": ({"messages": None}, "line 2: messages holds None, not a list of messages"),
    "null content": (
        {"messages": [{"role": "user", "content": None}]},
        "line 2: message 1 of messages holds content=null, and no tool_calls; it has role, content",
    ),
    "nothing": ({"messages": []}, "line 2: messages holds [], not a list of messages"),
    "no role": (
        {"messages": [{"speaker": "human", "value": "hi"}]},
        "message 1 of messages has no role; it has speaker, value",
    ),
    "an unknown speaker": (
        {"messages": [{"from": "bing", "value": "hi"}]},
        "message 1 of messages is from 'bing', which is not one of system, user, assistant, tool, function_call, to",
    ),
    "a function call without arguments": (
        {"messages": [{"from": "human", "value": "add"}, {"from": "function_call", "value": '{"name": "add"}'}]},
        'message 2 of messages is from function_call and holds \'{"name": "add"}\'; it must be the JSON of a call with',
    ),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "a"}, *chat("hi", "hello")], "system": "b"},
        "line 2 has a system beside a message of that role: keep one, which is text",
    ),
    "a system that is a list": (
        {"messages": chat("hi", "hello"), "system": ["b"]},
        "line 2 has a system of ['b'], not text: keep one, which is text",
    ),
    "a system beside texts": (
        {"prompt": "hi", "completion": "hello", "system": "b"},
        "line 2 has a system beside a prompt of text: give the prompt and the answers as messages",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "line 2: message 1 of messages has no content; it has role"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "message 1 of messages holds content of the type image; only text is supported",
    ),
    "part of no type": (
        {"messages": [{"role": "user", "content": ["hi"]}]},
        "message 1 of messages holds content of the type None; only text is supported",
    ),
    "a call that the template leaves out": (
        {"messages": [*chat("hi"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
        "line 2 calls add, and the chat template of data.tokenizer=",
    ),
    "no answer": (
        {"messages": chat("hi")},
        "line 2 has no message of the role assistant, but of user: there is nothing to learn",
    ),
    "no question": ({"messages": chat("hi", "hello")[1:]}, "line 2 begins with a message of the role assistant, which"),
    "a special token": (
        {"messages": chat("hi", "say <|im_end|>")},
        "line 2: message 2 of messages spells the special token <|im_end|>, which the model would read as the token",
    ),
    "a NUL": ({"messages": chat("h\0i", "hello")}, "line 2: message 1 of messages holds a NUL at character 1"),
    "tools": ({"messages": chat("hi", "hello"), "tools": "add"}, "line 2: tools holds 'add', not a list of JSON schem"),
    "an empty completion": ({"prompt": "hi", "completion": ""}, "line 2 has an empty completion, so there is nothing"),
    "a pair": ({"chosen": "hi", "rejected": "ho"}, "it has chosen, rejected: data=preferences reads chosen"),
    "only a completion": (
        {"completion": "hi"},
        "has neither messages nor prompt and completion nor instruction and output",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_record_that_cannot_be_trained_on_is_refused_with_its_line_or_left_out(tmp_path, case, capsys):
    record, message = REFUSED[case]
    path = write(tmp_path, "a.jsonl", [RECORDS[0], record, RECORDS[2]])
    with pytest.raises(ConfigError) as refused:
        tokenised(settings(tmp_path, path))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert tokenised(settings(tmp_path, path, malformed="skip")).contents["records"] == 2
    assert "data.malformed=skip left out 1 records, the first: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (GEMMA3, chat("hi", "hello")[:1] * 2 + chat("hi", "hello")[1:], "data.tokenizer=folder fails: Conversation ro"),
        (
            R1,
            chat("hi", "hello"),
            "hi<eos><|assistant|><think>\\n', which its own rend",
        ),
        (QWEN35.replace("> ns.last", "> 9"), chat("hi", "hello"), "<think>\\n', which its own rendering of that turn"),
    ],
    ids=["roles that do not alternate", "R1", "a template that drops all thinking"],
)
def test_a_template_that_does_not_show_what_to_train_on_is_refused(template, messages, message):
    with pytest.raises(RecordError) as refused:
        trained(template, {"messages": messages})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"packing": "cut"}, "data.packing=cut would cut conversations, and data.chat=true: use whole or truncate"),
        ({"field": "input_ids"}, "data.field=input_ids and data.chat=true exclude each other"),
        (
            {"chat": False, "chat_template_kwargs": {"a": 1}},
            "data.chat_template_kwargs is only read with",
        ),
        ({"chat": False, "packing": "cut", "columns": {"output": "a"}}, "data.columns={output: a} is only read with"),
        ({"columns": {"messages": "a"}}, "messages must be one of system, .*; data.field names the field of the messa"),
        ({"columns": {"output": ""}}, "data.columns={output: } must give the name of a field for each"),
    ],
    ids=["cut", "tokens", "unread", "columns of a text", "a column for messages", "a column without a name"],
)
def test_settings_that_exclude_each_other_are_refused(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, tmp_path, **more)


def test_tokenizers_without_a_template_are_refused(tmp_path):
    path = write(tmp_path, "a.jsonl", RECORDS)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=bytes has no tokenizer\.json, which data\.chat=true needs"):
        tokenised(settings(tmp_path, path, tokenizer="bytes"))
    folder = write_tokenizer(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"plain has no chat_template, which data\.chat=true needs"):
        tokenised(settings(tmp_path, path, tokenizer=str(folder)))
    (folder / "chat_template.jinja").write_text(QWEN3)
    assert tokenised(settings(tmp_path, path, tokenizer=str(folder))).contents["records"] == 3


def test_a_variable_that_the_template_does_not_read_is_refused():
    with pytest.raises(
        ConfigError, match=r"kwargs has enable_thinkng, which the chat template of data.tokenizer=folder"
    ):
        dialogues(QWEN3, enable_thinking=False, enable_thinkng=False)
    with pytest.raises(ConfigError, match="has enable_thinking, which"):
        dialogues(SMOLLM2, enable_thinking=False)
    dialogues({"default": SMOLLM2, "tool_use": QWEN3}, enable_thinking=False)


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hi")
    with pytest.raises(ConfigError, match=r"data\.chat=true needs records, but .*a\.txt is read as text"):
        tokenised(settings(tmp_path, tmp_path / "a.txt"))
