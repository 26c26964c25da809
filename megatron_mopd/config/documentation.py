"""Reads the field docstrings of the configuration's dataclasses from their source."""

from __future__ import annotations

import ast
import inspect
from functools import cache


@cache
def field_documentation(cls: type) -> dict[str, str]:
    """Field -> the string after it in the source, joined into one line ("" for a field without one)."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    documented = {}
    for statement, following in zip(node.body, [*node.body[1:], None]):
        if isinstance(statement, ast.AnnAssign):
            value = following.value if isinstance(following, ast.Expr) else None
            text = value.value if isinstance(value, ast.Constant) else ""
            documented[statement.target.id] = " ".join(text.split())
    return documented
