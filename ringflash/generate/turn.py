"""The tokens around a user's message in a chat template."""

from __future__ import annotations

from typing import Any

from ringflash.errors import ConfigError, reason


def chat_turn(tokenizer: Any, name: str, system: str | None) -> tuple[list[int], list[int]]:
    """The tokens before and behind a user's message in the chat template of tokenizer=`name`. system: a message before.

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
    return before, after
