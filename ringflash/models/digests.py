"""Digests of source code, by which functions of transformers are recognised: equal digests mean equal code.

Families copy their layers from each other, so one digest covers dozens of classes. If a release of transformers changes
the code of a class, the class is no longer recognised.
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

    Empty if there is no source.
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
    """The global names of a function's module."""
    return getattr(inspect.unwrap(function), "__globals__", {})
