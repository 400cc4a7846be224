"""Chat templates of the forms that models have, a tokenizer for them, conversations, and files of them."""

import json

import datasets
import pyarrow.parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ringflash.data.chat import Dialogues
from tests.data.cases import config

# ChatML with its own system prompt.
SMOLLM2 = r"""
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

LLAMA3 = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}' }}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

# The system prompt goes into the first user turn, the assistant is called model, roles must alternate.
GEMMA3 = r"""
{{- bos_token }}
{%- set first = '' %}
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content + '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
    {{- (first if loop.first else '') + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""

# Turns after the last question have their thinking, perhaps an empty one; earlier ones lose it.
QWEN3 = r"""
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\n' }}{{- tools | tojson }}{{- '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}
    {%- endif %}
    {{- message.content or '' }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

# As Qwen 3, but the prompt for an answer begins its thinking.
QWEN35 = QWEN3[: QWEN3.rindex("    {%- if enable_thinking")] + r"{{- '<think>\n' }}{%- endif %}"

# Thinking in its own channel; the last answer ends in <|return|>, earlier ones in <|end|> and without thinking.
GPT_OSS = r"""
{{- '<|start|>system<|message|>You are ChatGPT.<|end|>' }}
{%- for message in messages %}
    {%- if message.role != 'assistant' %}
        {{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- elif loop.last and not add_generation_prompt %}
        {%- if 'thinking' in message %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
    {%- else %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

# An end of every turn, and an eos at the end of every conversation.
PHI3 = r"""
{%- for message in messages %}{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

# The template marks what is trained on: the answers without the line feed after them.
MARKED = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# Prompts with <think>, but renders answers without their thinking.
R1 = r"""
{%- for message in messages %}{{- '<|' + message.role + '|>' + message.content }}{{- eos_token }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>\n' }}{%- endif %}"""

# No special token ends a turn.
ENDLESS = r"""
{%- for message in messages %}{{- '### ' + message.role + ':\n' + message.content + '\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '### assistant:\n' }}{%- endif %}"""

TEMPLATES = {
    "SmolLM2": SMOLLM2,
    "Llama 3": LLAMA3,
    "Gemma 3": GEMMA3,
    "Qwen 3": QWEN3,
    "Qwen 3.5": QWEN35,
    "gpt-oss": GPT_OSS,
    "Phi 3": PHI3,
    "marked": MARKED,
}
EOS = {"gpt-oss": "<|return|>"}
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"),
    *("<end_of_turn>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
]


def chat_tokenizer(template: str | None, eos: str = "<eos>") -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with a few merges, special tokens and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("l", "l")]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [token for token in SPECIAL if token != eos]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token=eos, additional_special_tokens=special
    )
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str, system: str | None = None, **of_answers: str) -> list[dict]:
    """A conversation of these contents, user and assistant alternating; of_answers: more fields of each answer."""
    turns = [
        {"role": "assistant", "content": content, **of_answers} if i % 2 else {"role": "user", "content": content}
        for i, content in enumerate(contents)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


THINKING = {"reasoning_content": "hmm", "thinking": "hmm"}
TOOL = {"function": {"name": "add", "parameters": {"type": "object"}}, "type": "function"}  # sorted, as tables are
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def dialogues(template, eos="<eos>", field=None, train_on="all_turns", **variables):
    return Dialogues(chat_tokenizer(template, eos), "folder", field, variables, {}, train_on)


def trained(template, record, eos="<eos>", **more):
    """The trained texts of each document of a record."""
    documents = dialogues(template, eos, **more).parse("a.jsonl line 1", record)
    return [[text[begin:end] for begin, end in spans] for text, spans, _, _ in documents]


def write(folder, name, records):
    """A file, or a folder that `datasets` saved."""
    path = folder / name
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        datasets.Dataset.from_list(records).save_to_disk(path)
    return path


def settings(tmp_path, path, template=SMOLLM2, **more):
    """Those of conversations."""
    chat_tokenizer(template).save_pretrained(tmp_path / "tokenizer")
    return config(
        tmp_path, path, **{"tokenizer": str(tmp_path / "tokenizer"), "chat": True, "packing": "whole", **more}
    )


RECORDS = [
    {"messages": chat("hi", "hello", "more?", "yes", **THINKING), "tools": None},  # the columns of a table
    {"messages": [{"role": "user", "content": "add"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
     "tools": [TOOL]},
    {"messages": chat("who?", "me", system="Be kind.")},
]  # fmt: skip


ALPACA = {
    "instruction": "add",
    "input": "1 1",
    "output": "2",
    "history": [["hi", "hello"]],
    "prompt": "add 1 1",
    "n": 1,
}
