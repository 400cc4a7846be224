"""Conversations to documents: the tokenizer's own chat template, with the loss on the assistant's turns only.

A record holds one of these, and optionally `tools`, `system`, the text of a first message, and `chat_template_kwargs`:

    messages                        role and content, optionally tool_calls and the template's own fields
    prompt and completion           both text or both messages
    instruction, input and output   the texts of a question and its answer, as in Alpaca

messages.py has their other forms. An assistant's message with weight 0 or train false is not trained on, and with
data.train_on=last_turn none is but the last. The spans to train on are found in one of two ways:

1. The template marks them with {% generation %} blocks.
2. Otherwise, they follow from renderings of the conversation's beginnings. At an assistant's turn i, the model is
   prompted with P and should generate the rest of Q:

       P = render(messages[:i], with the generation prompt)        Q = render(messages[:i + 1])

   The span is what Q adds to P. A turn for which Q does not begin with P is refused, since its prompt is not known.

Some templates render a turn differently once others follow it: Qwen3 and gpt-oss drop the thinking of earlier turns.
Then the whole conversation does not begin with Q, and its text would teach the model what it should never generate.
Such a turn becomes a document of its own, with Q as its text: the prompt at that turn, and the answer.

    user 1, thinking and answer 1, user 2, thinking and answer 2        (capitals: trained on)

    document 1    user 1  ANSWER 1 WITH ITS THINKING
    document 2    user 1  answer 1  user 2  ANSWER 2 WITH ITS THINKING

Templates that keep earlier turns as they were (Llama 3, Gemma 3, ChatML) give one document with all spans.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from ringflash.data.config import ALL_TURNS, LAST_TURN
from ringflash.data.formats import Fields, Record, RecordError
from ringflash.data.messages import (
    HISTORY,
    INPUT,
    INSTRUCTION,
    OUTPUT,
    PLAIN,
    WEIGHT,
    from_json,
    message_of,
    messages_from_json,
    messages_of_turns,
    names_of,
    thinking,
)
from ringflash.data.records import IGNORE, SPELLED, Document, clean, spelled_out
from ringflash.data.tokenizer import special_tokens, text_only, uint32_array
from ringflash.errors import ConfigError, reason

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

MESSAGES, TOOLS, SYSTEM, PROMPT, COMPLETION = "messages", "tools", "system", "prompt", "completion"
FUNCTIONS = "functions"  # tools, in OpenAI's earlier form
LABEL = "label"  # of TRL's unpaired preferences: false for a completion that is not wanted
VARIABLES = "chat_template_kwargs"  # of one conversation, beside those of data.chat_template_kwargs
CONVERSATIONS = ("messages", "conversations", "conversation")  # usual names of the field of the messages
TURNS = (INSTRUCTION, INPUT, OUTPUT, HISTORY)
LOST = "lost: "  # begins the counts of what a template leaves out


class Rendered(NamedTuple):
    """The text of a document, and the spans of its characters that are trained on, ascending.

    begins: whether it is the first of its conversation. is_chat: rendered by a template, which spells special tokens.
    """

    text: str
    spans: list[tuple[int, int]]
    begins: bool = True
    is_chat: bool = True


class Given(NamedTuple):
    """What a conversation gives the template beside its messages."""

    tools: list[Any] | None
    variables: dict[str, Any]


class Dialogues:
    """Records are conversations, or prompts with their completions. reads: the fields beside that of the messages."""

    reads: tuple[str, ...] = (TOOLS, FUNCTIONS, SYSTEM, VARIABLES, PROMPT, COMPLETION, LABEL, *TURNS)

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, field: str | None, variables: dict[str, Any],
        columns: dict[str, str], train_on: str = ALL_TURNS,
    ) -> None:  # fmt: skip
        """name: of the tokenizer, for messages. field: that of the messages. variables: more, for the template.

        columns: the names that other fields have in the records, by the names that are read. train_on: ALL_TURNS or
        LAST_TURN.

        Raises ConfigError for a tokenizer without a template or a tokenizer.json, and for a variable that none of its
        templates reads.
        """
        if not tokenizer.is_fast or not tokenizer.chat_template:
            lacks = "chat_template" if tokenizer.is_fast else "tokenizer.json"
            or_else = ", or put a chat_template.jinja into that folder" if tokenizer.is_fast else ""
            raise ConfigError(
                f"data.tokenizer={name} has no {lacks}, which data.chat=true needs: give the tokenizer of a chat model"
                f"{or_else}"
            )
        templates = tokenizer.chat_template
        self._read = {*re.findall(r"\w+", _text_of(templates))}
        if unread := sorted(variables.keys() - self._read):
            raise ConfigError(
                f"data.chat_template_kwargs has {unread[0]}, which the chat template of data.tokenizer={name} does not "
                f"read"
            )
        self.field = field or MESSAGES
        self._named = columns
        self._columns = {name: columns.get(name, name) for name in self.reads} | {self.field: self.field}
        self.fields = Fields(tuple(self._columns.values()), self._refusal)
        self._tokenizer, self._name, self._variables, self._train_on = tokenizer, name, variables, train_on
        # Templates that ask whether the content is null do so to find calls. Others spell it: "None".
        self._reads_null = re.search(r"""\bcontent['"\]]* is (not )?none""", _text_of(templates)) is not None
        self._special = special_tokens(tokenizer)
        self.counts: Counter[str] = Counter()
        self._chat = _untruncated(tokenizer.backend_tokenizer)
        self._text = text_only(tokenizer, name)

    def _refusal(self, available: Sequence[str]) -> str | None:
        found = {name for name, column in self._columns.items() if column in available}
        if (unnamed := self._lacks_column(available)) is not None:
            return unnamed
        if self.field in found or {PROMPT, COMPLETION} <= found or {INSTRUCTION, OUTPUT} <= found:
            return None
        other = next((name for name in CONVERSATIONS if name in available), None)
        hint = (
            "data=preferences reads chosen" if "chosen" in available
            else f"data.field={other} reads {other}" if other
            else f"data.field names the field of the messages, and data.columns others, as in "
            f"data.columns={{{INSTRUCTION}: question, {OUTPUT}: answer}}"
        )  # fmt: skip
        return (
            f"has neither {self.field} nor {PROMPT} and {COMPLETION} nor {INSTRUCTION} and {OUTPUT}; it has "
            f"{', '.join(available) or 'none':.300}: {hint}"
        )

    def _lacks_column(self, available: Sequence[str]) -> str | None:
        """None, or that a record lacks a field of data.columns, which may be misspelled there."""
        lacking = [(name, column) for name, column in self._named.items() if column not in available]
        if not lacking:
            return None
        name, column = lacking[0]
        return f"has no {column}, which is data.columns.{name}; it has {', '.join(available) or 'none':.300}"

    # -- records to texts

    def split(self, where: str, record: Record) -> list[Record]:
        """The record, with its fields under the names that are read, and functions as tools."""
        named = {name: record[column] for name, column in self._columns.items() if column in record}
        functions = from_json(named.pop(FUNCTIONS, None))
        if functions and isinstance(functions, list) and not named.get(TOOLS):
            named[TOOLS] = [{"type": "function", "function": from_json(function)} for function in functions]
        return [named]

    def parse(self, where: str, record: Record) -> list[Rendered]:
        """The texts of a record, each with the spans to learn."""
        record = {**record, **{name: messages_from_json(record.get(name)) for name in (PROMPT, COMPLETION)}}
        asks = record[PROMPT] is not None or record[COMPLETION] is not None
        if asks and record.get(LABEL) is False:
            raise RecordError(f"{where} has {LABEL}=false, for a {COMPLETION} that is not wanted: KTO is not supported")
        turns = {INSTRUCTION, OUTPUT} <= record.keys() and (record[INSTRUCTION] is not None or not asks)
        if turns and record.get(self.field) is None and record.get(COMPLETION) is None:
            record = {**record, self.field: messages_of_turns(where, record, OUTPUT)}
        if record.get(self.field) is not None or not asks:
            messages, first = self._messages(where, self.field, record.get(self.field)), 0
        elif isinstance(record.get(PROMPT), str) and isinstance(record.get(COMPLETION), str):
            if record.get(SYSTEM):
                raise RecordError(
                    f"{where} has a {SYSTEM} beside a {PROMPT} of text: give the {PROMPT} and the answers as messages"
                )
            return [self._pair(where, record[PROMPT], record[COMPLETION])]
        elif isinstance(record[PROMPT], str) or isinstance(record[COMPLETION], str):
            raise unlike(where, {name: record[name] for name in (PROMPT, COMPLETION)})
        else:
            asked = self._messages(where, PROMPT, record.get(PROMPT))
            messages, first = [*asked, *self._messages(where, COMPLETION, record.get(COMPLETION))], len(asked)
        if messages[0]["role"] == "assistant":
            raise RecordError(f"{where} begins with a message of the role assistant, which no prompt asks for")
        if record.get(SYSTEM):
            messages, first = [self._system(where, record[SYSTEM], messages), *messages], first and first + 1
        given = Given(self._tools(where, record.get(TOOLS)), self._variables_of(where, record.get(VARIABLES)))
        answers, trained = self._trained(where, messages, first)
        self.counts["beside"] += asks and not first
        self.counts["empty"] += any(
            messages[i].keys() <= PLAIN and not str(messages[i]["content"]).strip() for i in trained
        )
        if self._is_marked(given.tools):
            documents = [self._marked(where, messages, given, first, {*answers} - {*trained})]
        else:
            documents = self._by_beginnings(where, messages, given, trained)
        self._check_rendered(where, messages, given, trained, documents)
        self.counts["conversations"] += 1
        self.counts["documents"] += len(documents)
        self.counts["endless"] += not self._has_end(documents[-1].text[: documents[-1].spans[-1][1]])
        return documents

    def _trained(self, where: str, messages: Sequence[dict[str, Any]], first: int) -> tuple[list[int], list[int]]:
        """The numbers of the assistant's messages from `first` on, and of those that are trained on."""
        answers = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        if not answers:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages[first:]))
            raise RecordError(
                f"{where} has no message of the role assistant, but of {roles}: there is nothing to learn"
            )
        last = self._train_on == LAST_TURN
        trained = [i for i in answers[-1 if last else 0 :] if messages[i].get(WEIGHT, 1)]
        if not trained:
            those = f"the only one of data.train_on={LAST_TURN}" if last else "all messages of the assistant"
            raise RecordError(f"{where} has {WEIGHT} 0 or train false in {those}: there is nothing to learn")
        return answers, trained

    def remarks(self, counts: Counter[str]) -> list[str]:
        """Lines for the user about parsed conversations that the template renders in unexpected ways."""
        found = spelled_out(counts)
        if counts["texts"]:
            found.append(
                f"{counts['texts']:,} records have a prompt and an answer of text, which are joined without the chat "
                f"template: that renders messages, and {INSTRUCTION} with its answer"
            )
        if counts["beside"]:
            found.append(
                f"{counts['beside']:,} records have {self.field}, which are trained on, and a {PROMPT} or {COMPLETION} "
                f"beside them, which is not read"
            )
        if counts["empty"]:
            found.append(
                f"{counts['empty']:,} conversations have an empty message of the assistant, which teaches the model to "
                f"end at once"
            )
        if counts["documents"] > counts["conversations"]:
            found.append(
                f"{counts['conversations']:,} conversations became {counts['documents']:,} documents: the chat "
                f"template renders earlier turns differently, and each turn is trained on as the model would answer it"
            )
        for name in sorted(name for name in counts if name.startswith(LOST)):
            found.append(
                f"{counts[name]:,} conversations have {name.removeprefix(LOST)} that the chat template leaves out, so "
                f"the model does not see it"
            )
        if counts["endless"]:
            found.append(
                f"{counts['endless']:,} conversations end without a special token that is trained on, so nothing "
                f"teaches the model where to stop: the chat template has none, or leaves it out of its generation block"
            )
        return found

    def _pair(self, where: str, prompt: str, completion: str) -> Rendered:
        if not completion:
            raise RecordError(f"{where} has an empty {COMPLETION}, so there is nothing to learn")
        begin, end = clean(prompt, f"{where}: {PROMPT}"), clean(completion, f"{where}: {COMPLETION}")
        self.counts["texts"] += 1
        if found := self._special.search(begin) or self._special.search(end):
            self.counts[f"{SPELLED}{found[0]}"] += 1
        return Rendered(begin + end, [(len(begin), len(begin + end))], is_chat=False)

    def _messages(self, where: str, name: str, value: Any) -> list[dict[str, Any]]:
        """Messages in the form that templates expect."""
        value = from_json(value)
        if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
            raise RecordError(f"{where}: {name} holds {value!r:.60}, not a list of messages with role and content")
        found = []
        for number, message in enumerate(value, 1):
            place = f"{where}: message {number} of {name}"
            message = self._plain(place, message_of(place, message))
            if "tool_calls" in message and not message["content"]:
                message["content"] = None if self._reads_null else ""
            found.append(message)
        return found

    def _system(self, where: str, value: Any, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The first message, where a record has its text beside the messages."""
        if not isinstance(value, str) or messages[0]["role"] == SYSTEM:
            beside = "beside a message of that role" if isinstance(value, str) else f"of {value!r:.60}, not text"
            raise RecordError(f"{where} has a {SYSTEM} {beside}: keep one, which is text")
        return {"role": SYSTEM, "content": self._plain(f"{where}: {SYSTEM}", value)}

    def _tools(self, where: str, value: Any) -> list[Any] | None:
        """Tools in the form that templates expect, as JSON schemas. Tables often hold them as text."""
        value = from_json(value)
        if not value:
            return None
        tools = [from_json(tool) for tool in value] if isinstance(value, list) else [value]
        if not all(isinstance(tool, dict) for tool in tools):
            raise RecordError(f"{where}: {TOOLS} holds {value!r:.60}, not a list of JSON schemas")
        return self._plain(f"{where}: {TOOLS}", tools)

    def _variables_of(self, where: str, value: Any) -> dict[str, Any]:
        """Variables of one conversation. Tables have null for those that it lacks."""
        value = from_json(value) or {}
        if not isinstance(value, dict):
            raise RecordError(f"{where}: {VARIABLES} holds {value!r:.60}, not names with values")
        return self._plain(f"{where}: {VARIABLES}", {name: x for name, x in value.items() if x is not None})

    def _plain(self, where: str, value: Any) -> Any:
        """The value with clean texts. A text that spells a special token is refused, since it could end a turn."""
        if isinstance(value, dict):
            return {key: self._plain(where, x) for key, x in value.items()}
        if isinstance(value, list):
            return [self._plain(where, x) for x in value]
        if isinstance(value, str) and (found := self._special.search(value)):
            raise RecordError(
                f"{where} spells the special token {found[0]}, which the model would read as the token: remove it"
            )
        return clean(value, where) if isinstance(value, str) else value

    # -- texts and spans

    def _is_marked(self, tools: list[Any] | None) -> bool:
        template = self._tokenizer.get_chat_template(tools=tools)
        return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    def _marked(self, where: str, messages: list[Any], given: Given, first: int, left_out: set[int]) -> Rendered:
        """The whole conversation, with the spans that the template marks.

        Those of a prompt's messages are left out, and those of the messages `left_out`. Blocks that are not one per
        message tell the last turn alone, as what follows its prompt.
        """
        text, spans = self._render(where, messages, given, mark=True)
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if left_out and len(spans) == len(said):
            spans = [span for i, span in zip(said, spans, strict=True) if i not in left_out]
        elif left_out and self._train_on == LAST_TURN:
            first = said[-1]
        elif left_out:
            raise RecordError(
                f"{where} has messages of {WEIGHT} 0 or train false, which need a generation block per message of the "
                f"assistant: the chat template marks {len(spans)} blocks, for {len(said)} messages"
            )
        if first:
            prompt, _ = self._render(where, messages[:first], given, prompted=True)
            if not text.startswith(prompt):
                raise RecordError(
                    f"{where}: the chat template renders the prompt for message {first + 1} differently once that "
                    f"follows, so the text to train on is unknown"
                )
            spans = [(max(begin, len(prompt)), end) for begin, end in spans if end > len(prompt)]
        if not any(end > begin for begin, end in spans):
            raise RecordError(f"{where}: the chat template's generation blocks mark nothing in it")
        return Rendered(text, [(begin, end) for begin, end in spans if end > begin])

    def _by_beginnings(self, where: str, messages: list[Any], given: Given, trained: Sequence[int]) -> list[Rendered]:
        """Documents in which each trained turn follows the prompt that the model gets for it."""
        documents: list[Rendered] = []
        for turn in reversed(trained):
            prompt, _ = self._render(where, messages[:turn], given, prompted=True)
            answered, _ = self._render(where, messages[: turn + 1], given)
            if not answered.startswith(prompt):
                raise RecordError(
                    f"{where}: the chat template prompts for message {turn + 1} with ...{prompt[-30:]!r}, which its "
                    f"own rendering of that turn does not begin with, so the text to train on is unknown; use a "
                    f"template with generation blocks, or other data.chat_template_kwargs"
                )
            end = self._shared(answered, documents[-1].text) if documents else None
            if end is None:
                documents.append(Rendered(answered, [(len(prompt), len(answered))], begins=False))
            else:
                documents[-1].spans.insert(0, (len(prompt), end))
        documents.reverse()
        return [documents[0]._replace(begins=True), *documents[1:]]

    def _check_rendered(
        self, where: str, messages: list[Any], given: Given, trained: Sequence[int], found: list[Rendered]
    ) -> None:
        """Count what the template leaves out. Raises RecordError for a call that is to be trained on."""
        learned = "\n".join(text[begin:end] for text, spans, *_ in found for begin, end in spans)
        lost = set()
        for message in (messages[i] for i in trained):
            if unsaid := [name for name in names_of(message.get("tool_calls")) if name not in learned]:
                raise RecordError(
                    f"{where} calls {unsaid[0]}, and the chat template of data.tokenizer={self._name} renders no call "
                    f"of it: give the tokenizer of a model that calls tools"
                )
            inside, _, said = str(message["content"] or "").rpartition("</think>")
            thoughts = (thinking(message).strip(), inside.rpartition("<think>")[2].strip())
            lost |= {"thinking"} if any(thought not in learned for thought in thoughts) else set()
            lost |= {"text of the assistant"} if said.strip() not in learned else set()
        text = found[-1].text
        lost |= {"a tool"} if any(name not in text for name in names_of(given.tools)) else set()
        lost |= {VARIABLES} if given.variables.keys() - self._read else set()
        for message in messages[: trained[-1]]:
            if message["role"] != "assistant" and not _holds(text, str(message["content"] or "").strip()):
                lost.add(f"a message of the role {message['role']}")
        self.counts.update(f"{LOST}{what}" for what in lost)

    def _shared(self, answered: str, text: str) -> int | None:
        """Where a turn ends in the text of a later one; None if the later text renders it differently.

        A template may end every conversation with an eos_token, which a later text lacks. It is then enough that the
        turn itself ends with a special token, from which the model learns where to stop.
        """
        if text.startswith(answered):
            return len(answered)
        turn = answered.removesuffix(str(self._tokenizer.eos_token))
        return len(turn) if self._has_end(turn) and text.startswith(turn) else None

    def _has_end(self, turn: str) -> bool:
        """Whether a text ends with a special token, followed by white space at most."""
        return any(found.end() == len(turn.rstrip()) for found in self._special.finditer(turn))

    def _render(
        self, where: str, messages: list[Any], given: Given, prompted: bool = False, mark: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and with `mark` the spans of its generation blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._tokenizer.get_chat_template(tools=given.tools)
        variables = {**self._tokenizer.special_tokens_map, **self._variables, **given.variables}
        try:
            texts, spans = cast(Any, render_jinja_template)(
                [messages], given.tools, chat_template=template, add_generation_prompt=prompted,
                return_assistant_tokens_mask=mark, **variables,
            )  # fmt: skip
        except Exception as error:  # jinja2's, and whatever the template's expressions raise
            raise RecordError(
                f"{where}: the chat template of data.tokenizer={self._name} fails: {reason(error)}"
            ) from error
        return texts[0], spans[0] if mark else []

    # -- texts to tokens

    def encode(self, parsed: Sequence[Rendered]) -> Iterator[Document]:
        """The documents of texts. Learnt are tokens that hold a character of a span, and the eos after a completion."""
        chats = self._chat.encode_batch([x.text for x in parsed if x.is_chat], add_special_tokens=False)
        pairs = self._text.encode_batch([x.text for x in parsed if not x.is_chat])
        encodings = {True: iter(chats), False: iter(pairs)}
        for rendered in parsed:
            tokens, labels = _labelled(next(encodings[rendered.is_chat]), rendered.spans)
            document = Document(tokens, labels, rendered.begins)
            yield document if rendered.is_chat else self._ended(document)

    def _ended(self, document: Document) -> Document:
        """A completion's document, with its end of text as a label."""
        eos, tokens, labels = self._tokenizer.eos_token_id, document.tokens, document.labels
        assert labels is not None
        if not len(tokens) or tokens[-1] != eos:
            return document._replace(tokens=np.append(tokens, eos), labels=np.append(labels, np.int32(eos)))
        labels[-1] = eos
        return document


def unlike(where: str, given: dict[str, Any]) -> RecordError:
    """The refusal of fields of which one holds text, and another messages or nothing."""
    held = " and ".join(f"{value!r:.40} in {name}" for name, value in given.items())
    return RecordError(f"{where} holds {held}: both must be texts, or both lists of messages")


def _text_of(templates: str | dict[str, str]) -> str:
    return templates if isinstance(templates, str) else " ".join(templates.values())


def _holds(text: str, said: str) -> bool:
    """Whether a text holds another, as it is or as JSON: templates render results of tools either way."""
    return said in text or any(json.dumps(said, ensure_ascii=x)[1:-1] in text for x in (True, False))


def _labelled(encoding: Encoding, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, int64, and labels, int32: the tokens that hold a character of a span, or IGNORE.

    A token of spaces may have the empty offsets (end, end), which lies in the span that it ends in.
    """
    tokens = uint32_array(encoding.ids).astype(np.int64)
    begins, ends = uint32_array([*itertools.chain.from_iterable(encoding.offsets)]).reshape(-1, 2).T
    trained = np.zeros(len(tokens), bool)
    for begin, end in spans:
        trained |= (ends > begin) & ((begins < end) | ((begins == ends) & (ends == end)))
    return tokens, np.where(trained, tokens, IGNORE).astype(np.int32)


def _untruncated(backend: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer's backend that neither truncates nor pads."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
