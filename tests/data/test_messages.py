"""Messages in the forms that trainers have are read as the same conversation; what is not text is refused."""

import json

import pytest

from ringflash.data import tokenised
from ringflash.data.formats import RecordError
from tests.data.chat_cases import (
    CALL,
    LLAMA3,
    MARKED,
    QWEN3,
    SMOLLM2,
    TOOL,
    chat,
    chat_tokenizer,
    dialogues,
    settings,
    trained,
    write,
)


@pytest.mark.parametrize(
    ("user", "assistant"),
    [("human", "gpt"), ("User", "Assistant"), ("user", "model")],
    ids=["gpt", "capitals", "model"],
)
@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")], ids=["role", "from"])
def test_roles_of_other_names_are_the_users_and_the_assistants(names, user, assistant):
    messages = chat("hi", "hello", "more?", "yes")
    theirs = [
        dict(zip(names, (assistant if i % 2 else user, message["content"]), strict=True))
        for i, message in enumerate(messages)
    ]
    parse = dialogues(SMOLLM2).parse
    assert parse("here", {"messages": theirs}) == parse("here", {"messages": messages})


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_a_role_of_calls_holds_the_json_of_a_call(role):
    messages = chat("add", "", "", "It is 2.")
    messages[1] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    messages[2] = {"role": "tool", "content": "2"}
    theirs = [
        messages[0],
        {"role": role, "content": json.dumps(CALL["function"])},
        {"role": "tool_response", "content": "2"},
        messages[3],
    ]
    parse = dialogues(QWEN3).parse
    assert parse("here", {"messages": theirs}) == parse("here", {"messages": messages})


def test_a_template_may_read_the_role_observation():
    messages = [*chat("add"), {"role": "observation", "content": "2"}, {"role": "assistant", "content": "two"}]
    [document] = dialogues(SMOLLM2).parse("here", {"messages": messages})
    assert "<|im_start|>observation\n2<|im_end|>" in document.text


@pytest.mark.parametrize("as_text", [False, True], ids=["objects", "JSON text"])
def test_functions_are_tools(tmp_path, as_text):
    functions = json.dumps([TOOL["function"]]) if as_text else [TOOL["function"]]
    records = [{"messages": chat("hi", "hello"), "functions": functions}]
    found = tokenised(settings(tmp_path, write(tmp_path, "a.jsonl", records), QWEN3))
    assert '"name": "add"' in chat_tokenizer(QWEN3).decode(found.tokens)


def test_empty_text_for_arguments_is_no_argument():
    call = {"type": "function", "function": {"name": "add", "arguments": ""}}
    [[found]] = trained(QWEN3, {"messages": [*chat("add"), {"role": "assistant", "tool_calls": [call]}]})
    assert '{"name": "add", "arguments": {}}' in found


def test_a_call_may_have_its_name_and_arguments_in_itself():
    parse = dialogues(LLAMA3).parse
    found = [
        parse("here", {"messages": [*chat("add"), {"role": "assistant", "tool_calls": [call]}]})
        for call in (CALL["function"], CALL)
    ]
    assert found[0] == found[1]


def with_arguments(arguments):
    return [*chat("hi"), {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}]


REFUSED = {
    "an object": (
        [*chat("hi"), {"role": "tool", "content": {"a": 1}}],
        "holds content={'a': 1}, not text; give an obj",
    ),
    "a number": ([{"role": "user", "content": 3}], "message 1 of messages holds content=3, not text"),
    "half of a call": (
        with_arguments('{"a": '),
        "message 2 of messages calls add with arguments that are not JSON: '{",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused(case):
    messages, message = REFUSED[case]
    with pytest.raises(RecordError) as refused:
        trained(QWEN3, {"messages": [*messages, {"role": "assistant", "content": "yes"}]})
    assert message in str(refused.value)


# -- what a run reports


def reported(tmp_path, capsys, template, *records, **more):
    """What tokenising some records prints."""
    tokenised(settings(tmp_path, write(tmp_path, "a.jsonl", records), template, **more))
    return capsys.readouterr().out


def test_text_of_the_assistant_that_the_template_leaves_out_is_reported(tmp_path, capsys):
    beside = {
        "messages": [*chat("hi"), {"role": "assistant", "content": "Wait.", "tool_calls": [CALL]}],
        "tools": [TOOL],
    }
    line = "1 conversations have text of the assistant that the chat template leaves out"
    assert line in reported(tmp_path, capsys, LLAMA3, beside)
    assert line not in reported(tmp_path, capsys, QWEN3, beside)
    drops = SMOLLM2.replace("message.content", "message.content.split('</think>')[-1]")
    inside = {"messages": chat("hi", "<think>\nhmm\n</think>\n\nhello")}
    assert "1 conversations have thinking that the chat template leaves out" in reported(
        tmp_path, capsys, drops, inside
    )
    assert "leaves out" not in reported(tmp_path, capsys, SMOLLM2, inside)


def test_generation_blocks_without_the_end_of_the_turn_are_reported(tmp_path, capsys):
    content = "{{- message.content + '<|im_end|>' }}"
    ends_later = MARKED.replace(f"{content}{{%- endgen", "{{- message.content }}{%- endgen").replace(
        "{%- endgeneration %}", "{%- endgeneration %}{{- '<|im_end|>' }}"
    )
    record = {"messages": chat("hi", "hello")}
    line = "1 conversations end without a special token that is trained on"
    assert line in reported(tmp_path, capsys, ends_later, record)
    assert line not in reported(tmp_path, capsys, MARKED, record)


RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"


@pytest.mark.parametrize("preferences", [False, True])
def test_texts_that_a_template_rendered_before_are_reported(tmp_path, capsys, preferences):
    record = {"prompt": RENDERED, **({"chosen": "a", "rejected": "b"} if preferences else {"completion": "a"})}
    plain = record | {"prompt": "hi"}
    found = reported(tmp_path, capsys, SMOLLM2, record, plain, preferences=preferences)
    assert "1 texts spell special tokens, such as <|im_start|>, which are read as text and not as the tokens" in found
    assert "2 records have a prompt and an answer of text, which are joined without the chat template" in found
    assert "spell" not in reported(tmp_path, capsys, SMOLLM2, plain, preferences=preferences)
    texts = [{"text": RENDERED}, {"text": "<|im_start"}, {"text": RENDERED}]
    found = reported(tmp_path, capsys, SMOLLM2, *texts, chat=False, packing="cut")
    assert "2 texts spell special tokens, such as <|im_start|>" in found
