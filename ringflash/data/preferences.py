"""Preferences to pairs of documents: a prompt with the answer that was chosen, and with the one that was rejected.

A record holds `prompt`, `chosen` and `rejected`, all texts or all messages, as in TRL. With messages, it may also hold
`tools` and `system`. In Alpaca's form, `instruction` and `input` are texts of the prompt, for the chat template. If
`prompt` has no messages, or both answers repeat them, those that `chosen` and `rejected` begin with alike are the
prompt:

    prompt                chosen               rejected
    "2 + 2 = "            "4"                  "5"
    [user]                [assistant]          [assistant]
                          [user, assistant]    [user, assistant]

Each half is read as a prompt and its completion are (chat.py), and becomes one document.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ringflash.data.chat import COMPLETION, FUNCTIONS, PROMPT, SYSTEM, TOOLS, VARIABLES, Dialogues, Rendered, unlike
from ringflash.data.formats import Record, RecordError
from ringflash.data.messages import HISTORY, INPUT, INSTRUCTION, messages_from_json, messages_of_turns

CHOSEN, REJECTED = "chosen", "rejected"


class Preferences(Dialogues):
    """Records are pairs of a chosen and a rejected answer."""

    reads = (PROMPT, CHOSEN, REJECTED, TOOLS, FUNCTIONS, SYSTEM, VARIABLES, INSTRUCTION, INPUT, HISTORY)

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, variables: dict[str, Any], columns: dict[str, str]
    ) -> None:
        """See `Dialogues`."""
        super().__init__(tokenizer, name, None, variables, columns)

    def _refusal(self, available: Sequence[str]) -> str | None:
        if (unnamed := self._lacks_column(available)) is not None:
            return unnamed
        if lacking := [name for name in (CHOSEN, REJECTED) if self._columns[name] not in available]:
            return (
                f"has no {' and no '.join(lacking)}; it has {', '.join(available) or 'no field'}: data.columns names "
                f"the fields, as in data.columns={{{CHOSEN}: better, {REJECTED}: worse}}"
            )
        return None

    def parse(self, where: str, record: Record) -> list[Rendered]:
        """The texts of a pair, the chosen one first."""
        prompt, answers = self._divided(where, record)
        asked = {PROMPT: prompt, TOOLS: record.get(TOOLS), SYSTEM: record.get(SYSTEM), VARIABLES: record.get(VARIABLES)}
        chosen = self._answer(f"{where}: {CHOSEN}", asked | {COMPLETION: answers[CHOSEN]})
        of_chosen = self.counts.copy()
        rejected = self._answer(f"{where}: {REJECTED}", asked | {COMPLETION: answers[REJECTED]})
        self.counts = of_chosen  # remarks are on what the model learns, and rejected answers are not learned
        if chosen.text == rejected.text:
            raise RecordError(f"{where} has the same {CHOSEN} and {REJECTED}: there is nothing to prefer")
        return [chosen, rejected._replace(begins=False)]

    def _divided(self, where: str, record: Record) -> tuple[Any, dict[str, Any]]:
        """The prompt and the two answers of a record, all texts or all lists of messages."""
        if record.get(PROMPT) is None and record.get(INSTRUCTION) is not None:
            asked = {name: messages_of_turns(where, record, name) for name in (CHOSEN, REJECTED)}
            return asked[CHOSEN][:-1], {name: messages[-1:] for name, messages in asked.items()}
        prompt, *answers = (messages_from_json(record.get(name)) for name in (PROMPT, CHOSEN, REJECTED))
        named = dict(zip((CHOSEN, REJECTED), answers, strict=True))
        if not (all(isinstance(x, str) for x in answers) or all(isinstance(x, list) for x in answers)):
            raise unlike(where, named)
        if isinstance(answers[0], str):
            if not isinstance(prompt, str) or not prompt:
                raise RecordError(
                    f"{where}: {PROMPT} holds {prompt!r:.40}, and {CHOSEN} a text: it must be one too; "
                    f"data.columns={{{INSTRUCTION}: question}} reads another field, for the chat template"
                )
            return prompt, named
        if isinstance(prompt, list) and prompt and not all(x[: len(prompt)] == prompt for x in answers):
            return prompt, named
        self.counts["unread"] += isinstance(prompt, str)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*answers, strict=False)))
        if not shared:
            raise RecordError(
                f"{where}: {PROMPT} holds {prompt!r:.40}, and {CHOSEN} and {REJECTED} begin with no message in common: "
                f"the messages of the prompt are missing; data.columns={{{PROMPT}: conversations}} reads another field"
            )
        if (shorter := next((name for name, messages in named.items() if len(messages) == shared), None)) is not None:
            raise RecordError(
                f"{where}: {shorter} has only messages that both answers begin with: there is nothing to prefer"
            )
        return answers[0][:shared], {name: messages[shared:] for name, messages in named.items()}

    def _answer(self, where: str, record: Record) -> Rendered:
        """The text of a prompt and one answer. Raises RecordError for an answer of several documents."""
        found = super().parse(where, record)
        if len(found) > 1:
            raise RecordError(
                f"{where} has several messages of the assistant, of which the chat template renders earlier ones "
                f"differently: give an answer of one message"
            )
        return found[0]

    def remarks(self, counts: Counter[str]) -> list[str]:
        """See `Dialogues`."""
        unread = f"{counts['unread']:,} records have messages in {CHOSEN} and {REJECTED}, and a text in {PROMPT}"
        beside = [f"{unread}, which is not read: the messages that both begin with are the prompt"]
        return beside * (counts["unread"] > 0) + super().remarks(counts)
