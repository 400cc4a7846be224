"""Turn: the tokens around a document and its prompts, which a chat template gives, or the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ringflash.data.tokenizer import Encoder
from ringflash.errors import ConfigError, reason
from ringflash.generate.reading import ids_of


@dataclass(frozen=True)
class Turn:
    """Tokens before the document and behind each prompt: a chat template's, or what begins a text and nothing."""

    encoder: Encoder
    before: list[int]
    after: list[int]

    def ids(self, prompt: str) -> list[int]:
        """A prompt's tokens, and what follows it."""
        return [*ids_of(self.encoder, prompt), *self.after]


def chat_turn(encoder: Encoder, tokenizer: Any, name: str, system: str | None) -> Turn:
    """The turn of a user's message in the chat template of tokenizer=`name`, after a system message if there is one.

    Raises ConfigError for a tokenizer without a template, or whose template fails or does not show a message as it is.
    """
    mark = "ringflash-message"
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"chat=true needs a chat template, and tokenizer={name} has none: leave chat out")
    message = [{"role": "user", "content": mark}]
    if system is not None:
        message.insert(0, {"role": "system", "content": system})
    try:
        rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # jinja2's, and whatever the template's expressions raise
        raise ConfigError(f"chat=true: the chat template of tokenizer={name} fails: {reason(error)}") from error
    if rendered.count(mark) != 1:
        raise ConfigError(f"chat=true: the chat template of tokenizer={name} does not show a message once, as it is")
    before, after = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in rendered.split(mark))
    return Turn(encoder, before, after)
