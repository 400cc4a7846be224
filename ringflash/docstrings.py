"""The docstrings below the fields of a dataclass, which are the sentences of --help."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import is_dataclass
from typing import Any


@functools.cache
def field_docstrings(part: Any) -> dict[str, str]:
    """The docstring of each field of a dataclass, in one line; empty if there is none. Inherited ones come first."""
    body: list[ast.stmt] = []
    for kind in reversed(part.__mro__):
        if is_dataclass(kind):
            source = textwrap.dedent(inspect.getsource(kind))  # type: ignore[arg-type]
            body += ast.parse(source).body[0].body  # type: ignore[attr-defined]
    found = {}
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[statement.target.id] = " ".join(str(text).split())
    return found
