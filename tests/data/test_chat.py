"""Only the assistant's turns are trained on, as the model is prompted for them; errors locate bad records."""

import json
import random

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringflash.data import IGNORE, load_corpus, tokenised
from ringflash.data.chat import Dialogues
from ringflash.errors import ConfigError
from tests.data.chat_cases import (
    ALPACA,
    CALL,
    ENDLESS,
    EOS,
    LLAMA3,
    MARKED,
    QWEN3,
    RECORDS,
    SMOLLM2,
    TEMPLATES,
    THINKING,
    TOOL,
    chat,
    chat_tokenizer,
    dialogues,
    settings,
    trained,
    write,
)

# -- what is trained on


EXPECTED = {
    "SmolLM2": [["hello<|im_end|>\n", " yes <|im_end|>\n"]],
    "Llama 3": [["hello<|eot_id|>", "yes<|eot_id|>"]],
    "Gemma 3": [["hello<end_of_turn>\n", "yes<end_of_turn>\n"]],
    "Qwen 3": [
        ["<think>\nhmm\n</think>\n\nhello<|im_end|>\n"],
        ["<think>\nhmm\n</think>\n\n yes <|im_end|>\n"],
    ],
    "Qwen 3.5": [["hmm\n</think>\n\nhello<|im_end|>\n"], ["hmm\n</think>\n\n yes <|im_end|>\n"]],
    "gpt-oss": [
        ["<|channel|>analysis<|message|>hmm<|end|><|start|>assistant<|channel|>final<|message|>hello<|return|>"],
        ["<|channel|>analysis<|message|>hmm<|end|><|start|>assistant<|channel|>final<|message|> yes <|return|>"],
    ],
    "Phi 3": [["hello<|end|>\n", " yes <|end|>\n<eos>"]],
    "marked": [["hello<|im_end|>", " yes <|im_end|>"]],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_are_trained_on_with_their_thinking_and_their_end(name):
    messages = chat("hi", "hello", "more?", " yes ", system="Be kind.", **THINKING)
    assert trained(TEMPLATES[name], {"messages": messages}, EOS.get(name, "<eos>")) == EXPECTED[name]


texts = st.text(st.sampled_from("he l\nö<|x😀"), min_size=1, max_size=8).filter(str.strip)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "marked"])
@given(st.lists(texts, min_size=2, max_size=7), st.booleans(), st.booleans())
def test_each_answer_is_trained_on_once_behind_the_prompt_that_asks_for_it(name, contents, thinks, system):
    messages = chat(*contents, system="Be kind." if system else None, **(THINKING if thinks else {}))
    tokenizer = chat_tokenizer(TEMPLATES[name], EOS.get(name, "<eos>"))
    documents = Dialogues(tokenizer, "folder", None, {}, {}).parse("here", {"messages": messages})
    found = [(text[:begin], text[begin:end]) for text, spans, _, _ in documents for begin, end in spans]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(found) == len(answers)
    for i, (prompt, answer) in zip(answers, found, strict=True):
        assert prompt == tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        assert prompt + answer in (whole, whole.removesuffix("<eos>"))
    assert [begins for _, _, begins, _ in documents] == [True] + [False] * (len(documents) - 1)


@given(st.lists(texts, min_size=2, max_size=7))
def test_marked_tokens_are_those_of_transformers(contents):
    messages, tokenizer = chat(*contents), chat_tokenizer(MARKED)
    reading = Dialogues(tokenizer, "folder", None, {}, {})
    [document] = reading.encode(reading.parse("here", {"messages": messages}))
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert document.tokens.tolist() == theirs["input_ids"]
    expected = np.where(np.array(theirs["assistant_masks"]) == 1, document.tokens, IGNORE)
    # transformers takes no token of spaces for the beginning of a span, whose offsets are empty
    if not any(content[0] == " " for content in contents[1::2]):
        assert document.labels.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["SmolLM2", "Llama 3", "Gemma 3"])
@given(st.lists(texts, min_size=2, max_size=6))
def test_tokens_are_those_of_the_template_and_labels_spell_the_answers(name, contents):
    messages, tokenizer = chat(*contents[: len(contents) // 2 * 2]), chat_tokenizer(TEMPLATES[name])
    reading = Dialogues(tokenizer, "folder", None, {}, {})
    rendered = reading.parse("here", {"messages": messages})
    [document] = reading.encode(rendered)
    assert document.tokens.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    spelled = tokenizer.decode(document.labels[document.labels != IGNORE].tolist(), clean_up_tokenization_spaces=False)
    answers = "".join(rendered[0].text[begin:end] for begin, end in rendered[0].spans)
    assert spelled.endswith(answers[-12:])
    assert len(spelled) - len(answers) in range(3)  # a token may begin in the prompt's line feed


def test_a_token_of_spaces_inside_an_answer_is_trained_on():
    reading = dialogues(SMOLLM2)
    [document] = reading.encode(reading.parse("here", {"messages": chat("a   b", "x   y   ")}))
    decoded = chat_tokenizer(SMOLLM2).decode(document.labels[document.labels != IGNORE].tolist())
    assert decoded == "x   y   <|im_end|>\n"


def test_questions_behind_the_last_answer_are_left_out():
    [document] = dialogues(SMOLLM2).parse("here", {"messages": chat("hi", "hello", "unanswered")})
    assert document.text.endswith("hello<|im_end|>\n")


def test_tool_calls_are_trained_on_and_tool_results_are_not():
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    [found] = trained(QWEN3, {"messages": messages, "tools": [TOOL]})
    empty = "<think>\n\n</think>\n\n"
    assert found[0] == f'{empty}<tool_call>\n{{"name": "add", "arguments": {{"a": 1}}}}\n</tool_call><|im_end|>\n'
    assert found[1] == f"{empty}It is 2.<|im_end|>\n"


@pytest.mark.parametrize("as_text", [False, True], ids=["objects", "JSON text"])
def test_arguments_and_tools_that_are_json_text_are_rendered_as_objects(as_text):
    given = json.dumps(CALL["function"]["arguments"]) if as_text else CALL["function"]["arguments"]
    call = {"function": {"name": "add", "arguments": given}}
    messages = [{"role": "user", "content": "add"}, {"role": "assistant", "tool_calls": [call]}]
    tools = json.dumps([TOOL]) if as_text else [TOOL]
    [document] = dialogues(LLAMA3).parse("here", {"messages": messages, "tools": tools})
    assert document.text.endswith('{"name": "add", "parameters": {"a": 1}}<|eot_id|>')
    [document] = dialogues(QWEN3).parse("here", {"messages": messages, "tools": tools})
    assert json.dumps([TOOL]) in document.text


def test_a_prompt_and_completion_may_be_messages_as_json_text():
    parts = {"prompt": chat("hi"), "completion": chat("hi", "hello")[1:]}
    parse = dialogues(QWEN3).parse
    assert parse("here", {name: json.dumps(x) for name, x in parts.items()}) == parse("here", parts)


def test_messages_of_sharegpt_are_read():
    speakers = ("human", "gpt", "human", "gpt")
    messages = chat("hi", "hello", "more?", "yes")
    theirs = [{"from": x, "value": message["content"]} for x, message in zip(speakers, messages, strict=True)]
    assert trained(SMOLLM2, {"messages": theirs}) == trained(SMOLLM2, {"messages": messages})


@pytest.mark.parametrize("several", [False, True], ids=["one", "list"])
def test_function_calls_and_observations_of_sharegpt_are_read_as_tool_calls_and_results(several):
    call = json.dumps([CALL["function"]] * 2 if several else CALL["function"])
    theirs = [("human", "add"), ("function_call", call), ("observation", "2"), ("gpt", "It is 2.")]
    messages = chat("add", "", "", "It is 2.")
    messages[1] = {"role": "assistant", "content": None, "tool_calls": [CALL] * (1 + several)}
    messages[2] = {"role": "tool", "content": "2"}
    record = {"messages": [{"from": speaker, "value": value} for speaker, value in theirs], "tools": json.dumps([TOOL])}
    parse = dialogues(QWEN3).parse
    assert parse("here", record) == parse("here", {"messages": messages, "tools": [TOOL]})


IS_STRING = QWEN3.replace("message.content or ''", "message.content if message.content is string else ''")


@pytest.mark.parametrize("template", [SMOLLM2, QWEN3, IS_STRING], ids=["ChatML", "spells lists", "leaves lists out"])
def test_content_in_parts_is_joined(template):
    parts = [[{"type": "text", "text": half, "image": None} for half in (text[:1], text[1:])] for text in ("hi", "yes")]
    parse = dialogues(template).parse
    assert parse("here", {"messages": chat(*parts)}) == parse("here", {"messages": chat("hi", "yes")})


@pytest.mark.parametrize("name", ["Qwen 3", "Qwen 3.5", "gpt-oss"])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_trained_on_whatever_its_field_is_called(name, field):
    [[found]] = trained(TEMPLATES[name], {"messages": chat("hi", "hello", **{field: "hmm"})})
    assert "hmm" in found


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize(
    "said",
    [
        "{{ message.content }}{{ message.tool_calls | tojson if message.tool_calls }}",
        "{% if message.content is none %}{{ message.tool_calls | tojson }}{% else %}{{ message.content }}{% endif %}",
    ],
    ids=["spells null", "asks for null"],
)
def test_a_call_without_content_is_rendered_as_the_template_expects_it(content, said):
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}:" + said + "<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    messages = [*chat("add"), {"role": "assistant", "content": content, "tool_calls": [CALL]}]
    assert trained(template, {"messages": messages}) == [[json.dumps([CALL]) + "<|im_end|>"]]


def test_function_calls_of_openais_earlier_records_are_read_as_tool_calls_and_results():
    call = {"name": "add", "arguments": '{"a": 1}'}
    earlier = chat("add", "", "", "It is 2.")
    earlier[1] = {"role": "assistant", "content": "", "function_call": call}
    earlier[2] = {"role": "function", "name": "add", "content": "2"}
    now = [earlier[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, earlier[2] | {"role": "tool"}]
    parse = dialogues(QWEN3).parse
    assert parse("here", {"messages": earlier}) == parse("here", {"messages": [*now, earlier[3]]})


@pytest.mark.parametrize("split", [False, True], ids=["messages", "prompt and completion"])
def test_a_system_beside_the_messages_is_the_first_of_them(split):
    messages = chat("hi", "hello", "more?", "yes")
    first = [{"role": "system", "content": "Be kind."}]
    beside, inside = [
        {"prompt": [*begin, *messages[:2]], "completion": messages[2:]} if split else {"messages": [*begin, *messages]}
        for begin in ([], first)
    ]
    parse = dialogues(QWEN3).parse
    assert parse("here", beside | {"system": "Be kind."}) == parse("here", inside)
    assert parse("here", inside | {"system": ""}) == parse("here", inside)


def test_variables_reach_the_template():
    found = trained(QWEN3, {"messages": chat("hi", "hello")}, enable_thinking=False)
    assert found == [["hello<|im_end|>\n"]]


# -- texts of turns


def test_records_of_alpaca_are_turns_of_a_conversation(tmp_path):
    records = [ALPACA, {"instruction": "hi", "input": "", "output": "hello"}, {"instruction": "hi", "output": "hello"}]
    turns = [["hi", "hello", "add\n1 1", "2"], ["hi", "hello"], ["hi", "hello"]]
    found = tokenised(settings(tmp_path, write(tmp_path, "a.jsonl", records)))
    expected = tokenised(settings(tmp_path, write(tmp_path, "b.jsonl", [{"messages": chat(*x)} for x in turns])))
    assert all(np.array_equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_columns_name_the_fields_of_the_records(tmp_path, name):
    record = {"instruction": "hi", "output": "hello", "input": "there", "system": "Be kind."}
    columns = {"instruction": "question", "output": "instruction", "system": "who"}
    theirs = {columns.get(key, key): value for key, value in record.items()}
    found = tokenised(settings(tmp_path, write(tmp_path, name, [theirs] * 2), columns=columns))
    expected = tokenised(settings(tmp_path, write(tmp_path, "b.jsonl", [record] * 2)))
    assert np.array_equal(found.tokens, expected.tokens)
    with pytest.raises(ConfigError, match=r"has no whom, which is data\.columns\.system; it has question, instruction"):
        tokenised(settings(tmp_path, tmp_path / name, columns=columns | {"system": "whom"}))


# -- variables of one conversation


@pytest.mark.parametrize("as_text", [False, True], ids=["object", "JSON text"])
def test_variables_of_a_record_reach_the_template(as_text):
    variables = {"enable_thinking": False, "unset": None}
    record = {"messages": chat("hi", "hello"), "chat_template_kwargs": json.dumps(variables) if as_text else variables}
    assert trained(QWEN3, record) == [["hello<|im_end|>\n"]]
    assert trained(QWEN3, record | {"chat_template_kwargs": {"enable_thinking": True}}, enable_thinking=False) == [
        ["<think>\n\n</think>\n\nhello<|im_end|>\n"]
    ]


# -- prompts and completions


def test_the_completion_of_a_text_is_trained_on_with_its_end():
    tokenizer, reading = chat_tokenizer(SMOLLM2), dialogues(SMOLLM2)
    [document] = reading.encode(reading.parse("here", {"prompt": "2 <|im_end|> 2 = ", "completion": "hell"}))
    ids = tokenizer("2 <|im_end|> 2 = hell", split_special_tokens=True)["input_ids"]
    assert document.tokens.tolist() == [*ids, tokenizer.eos_token_id]
    assert document.labels.tolist() == [IGNORE] * (len(ids) - 2) + [*ids[-2:], tokenizer.eos_token_id]


@pytest.mark.parametrize(("name", "end"), [("SmolLM2", "<|im_end|>\n"), ("marked", "<|im_end|>"), ("Phi 3", None)])
def test_answers_of_the_prompt_are_not_trained_on(name, end):
    messages = chat("hi", "hello", "more?", "yes")
    found = trained(TEMPLATES[name], {"prompt": messages[:3], "completion": messages[3:]})
    assert found == [[f"yes{end or '<|end|>' + chr(10) + '<eos>'}"]]


# -- files


@pytest.mark.parametrize("template", [QWEN3, LLAMA3], ids=["Qwen 3", "Llama 3"])
def test_jsonl_parquet_and_datasets_give_the_same_documents(tmp_path, template):
    found = [
        tokenised(settings(tmp_path, write(tmp_path, name, RECORDS), template))
        for name in ("a.jsonl", "a.parquet", "a")
    ]
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0][:3], other[:3], strict=True))
    assert found[0].contents["records"] == 3


def test_what_map_and_filter_leave_in_a_saved_folder_is_not_read(tmp_path):
    path = write(tmp_path, "a", RECORDS)
    loaded = datasets.load_from_disk(path)
    loaded.map(lambda record: {"count": len(record["messages"])}).filter(lambda record: True)
    assert len([*path.glob("*.arrow")]) == 3
    assert tokenised(settings(tmp_path, path, QWEN3)).contents["records"] == 3


def test_a_conversation_of_several_documents_is_held_out_whole(tmp_path):
    records = [{"messages": chat(f"{i}", "one", "then", "two")} for i in range(20)]
    corpora = load_corpus(settings(tmp_path, write(tmp_path, "a.jsonl", records), QWEN3, held_out=0.3))
    tokenizer = chat_tokenizer(QWEN3)
    asked = [
        {tokenizer.decode(corpus.document(i)).split("\n")[1].split("<")[0] for i in range(len(corpus))}
        for corpus in corpora
    ]
    assert [len(corpus) for corpus in corpora] == [28, 12]
    assert [len(numbers) for numbers in asked] == [14, 6]
    assert asked[0].isdisjoint(asked[1])


def test_the_template_and_its_variables_decide_the_cache(tmp_path):
    path = write(tmp_path, "a.jsonl", [{"messages": chat("hi", "hello")}] * 2)
    found = [
        tokenised(settings(tmp_path, path, QWEN3, chat_template_kwargs=variables)).contents["tokens"]
        for variables in ({}, {"enable_thinking": False}, {})
    ]
    assert found[0] == found[2]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_documents_that_a_template_makes_of_a_conversation_and_missing_ends_are_reported(tmp_path, capsys):
    path = write(tmp_path, "a.jsonl", [{"messages": chat("hi", "hello", "more?", "yes")}] * 3)
    tokenised(settings(tmp_path, path, QWEN3))
    assert "3 conversations became 6 documents: the chat template renders earlier turns" in capsys.readouterr().out
    tokenised(settings(tmp_path, path, ENDLESS))
    assert "3 conversations end without a special token that is trained on" in capsys.readouterr().out
    tokenised(settings(tmp_path, path, SMOLLM2))
    assert "conversations" not in capsys.readouterr().out


def test_a_prompt_beside_messages_is_not_read_which_is_reported(tmp_path, capsys):
    messages = {"messages": chat("hi", "hello")}
    beside = [messages | more for more in ({"prompt": "hi"}, {"prompt": "hi", "completion": "no"}, {"prompt": None})]
    found = tokenised(settings(tmp_path, write(tmp_path, "a.jsonl", beside)))
    line = "2 records have messages, which are trained on, and a prompt or completion beside them, which is not read"
    assert line in capsys.readouterr().out
    alone = tokenised(settings(tmp_path, write(tmp_path, "b.jsonl", [messages] * 3)))
    assert "beside" not in capsys.readouterr().out
    assert np.array_equal(found.tokens, alone.tokens)


def test_empty_answers_are_reported(tmp_path, capsys):
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    thinks = {"role": "assistant", "content": "", "reasoning_content": "hmm"}
    silent = [{"messages": chat("hi", *answers)} for answers in ((" ",), ("hello", "more?", ""), ("hello",))]
    full = [{"messages": [*chat("hi"), answer]} for answer in (call, thinks)]
    tokenised(settings(tmp_path, write(tmp_path, "a.jsonl", [*silent, *full]), QWEN3))
    assert "2 conversations have an empty message of the assistant, which" in capsys.readouterr().out
    tokenised(settings(tmp_path, write(tmp_path, "b.jsonl", full), QWEN3))
    assert "empty" not in capsys.readouterr().out


def test_what_the_template_leaves_out_is_reported(tmp_path, capsys):
    template = SMOLLM2.replace("for message in messages", "for message in messages if message.role != 'tool'")
    thinks = {"messages": chat("hi", "hello", **THINKING), "tools": [TOOL], "chat_template_kwargs": {"a": 1}}
    result = {"messages": [*chat("hi", "hello"), {"role": "tool", "content": "2"}, *chat("more?", "yes")]}
    tokenised(settings(tmp_path, write(tmp_path, "a.jsonl", [thinks, thinks, result]), template))
    out = capsys.readouterr().out
    for what in (
        "2 conversations have thinking",
        "2 conversations have a tool",
        "2 conversations have chat_template_kwargs",
        "1 conversations have a message of the role tool",
    ):
        assert f"{what} that the chat template leaves out, so the model does not see it" in out
    rendered = [{"messages": chat('a "b"\n', "x", **THINKING), "tools": [TOOL]}]
    tokenised(settings(tmp_path, write(tmp_path, "b.jsonl", rendered), QWEN3))
    assert "leaves out" not in capsys.readouterr().out


def test_no_conversation_is_cut_whatever_its_length(tmp_path):
    draw = random.Random(0)
    conversations = [["he" * draw.randrange(1, 30) for _ in range(2 * draw.randrange(1, 4))] for _ in range(60)]
    records = [{"messages": chat(*messages)} for messages in conversations]
    training, _ = load_corpus(settings(tmp_path, write(tmp_path, "a.jsonl", records), held_out=0))
    tokenizer = chat_tokenizer(SMOLLM2)
    expected = [tokenizer.apply_chat_template(record["messages"], return_dict=False) for record in records]
    assert [training.document(i).tolist() for i in range(len(training))] == expected
