"""What a function of transformers does, told by its source: two functions of one digest are the same code.

Families copy their layers from each other, so a digest stands for dozens of classes, and a class whose code changes
with a release of transformers is no longer taken for what it was.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable
from typing import Any

_LAYOUT = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
)  # fmt: skip


@functools.cache
def digest(function: Callable[..., Any]) -> str:
    """12 hexadecimal digits of a function's body: its tokens, without comments, docstring, signature and line breaks.

    Empty where there is no source.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):
        return ""
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    lines = source.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    tokens = tokenize.generate_tokens(io.StringIO(textwrap.dedent("\n".join(lines)) + "\n").readline)
    text = " ".join(token.string for token in tokens if token.type not in _LAYOUT)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def globals_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The names that a function's module gives it."""
    return getattr(inspect.unwrap(function), "__globals__", {})
