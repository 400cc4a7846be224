"""Read a text of a file or of standard input, and its tokens."""

from __future__ import annotations

import sys
from pathlib import Path

from ringflash.data.text import decoded
from ringflash.data.tokenizer import Encoder
from ringflash.errors import ConfigError, reason

STDIN = "-"


def text_of(name: str, path: str) -> str:
    """The text of a file, or of standard input (-). Raises ConfigError, with `name`, if it is empty or not UTF-8."""
    where = "standard input" if path == STDIN else f"{name}={path}"
    try:
        held = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror or reason(error)}") from error
    text = decoded(held, where, 0)
    if not text.strip():
        raise ConfigError(f"{where} {'holds white space alone' if text else 'is empty'}")
    return text


def ids_of(encoder: Encoder, text: str) -> list[int]:
    """Tokens of a text, nothing added."""
    return encoder.ids([text])[0].tolist()
