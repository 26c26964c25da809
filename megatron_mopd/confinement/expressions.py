"""Restricts the text that a worker's libraries may evaluate.

Verifiers pass parts of an answer to `eval`, `sympy.parse_expr` and the like. Whenever CPython turns text into
code, it raises the audit event `compile` with the text before compiling it; a hook parses the text into a
syntax tree and refuses anything but expressions of numbers, literals and mathematical functions. The
evaluating library sees an exception, as for any text that it cannot evaluate.

The kernel's limits protect the trainer; this check protects an answer's score from other answers and from
the answer itself.
"""

from __future__ import annotations

import ast
import re
import sys
from enum import Enum

_SYMPY_PRELUDE = "from sympy import *"  # executed by `sympy.parse_expr` itself
# Modules that generate their own code from numbers and from names that they validate. Not `lambdify`, which
# inserts the names of symbols.
_GENERATORS = frozenset(("collections", "dataclasses", "sympy.polys.monomials"))
_LONGEST = 100_000
_LONGEST_KNOWN, _MOST_KNOWN = 2000, 1000
# Without letters there are no names, so nothing can be called, imported or defined.
_WITHOUT_NAMES = re.compile(r"[0-9 .,+\-*/%()\[\]{}<>=:'\"\n]*")
# With a comment that declares another encoding, compiler and check would read different texts (PEP 263).
_ENCODING = re.compile(r"#.*coding[:=]")

# Allowed calls in a worker that scores further answers: constructors without side effects, which are all that
# sympy's parser and ordinary formulas need.
_PURE_CALLS = frozenset(
    """
    Symbol Integer Float Rational Number Function Add Mul Pow Mod Abs abs Eq Ne Lt Le Gt Ge And Or Not
    sqrt cbrt root exp log ln sin cos tan cot sec csc asin acos atan atan2 sinh cosh tanh factorial binomial
    floor ceiling Min Max gcd lcm tuple list set dict int float str bool range round min max sum len sorted
    """.split()
)
_CONSTANTS = frozenset("pi E I oo nan zoo true false True False None".split())
_FORBIDDEN = frozenset(
    """
    eval exec compile open input breakpoint exit quit help copyright credits license getattr setattr delattr
    hasattr vars globals locals dir memoryview super object type classmethod staticmethod property print id
    callable format sympify parse_expr lambdify preview test doctest plot init_printing init_session S source
    """.split()
)
# No nodes that bind names, access attributes or define code.
_NODES = frozenset(
    (
        ast.Expression,
        ast.Module,
        ast.Expr,
        ast.Constant,
        ast.Name,
        ast.Load,
        ast.Call,
        ast.keyword,
        ast.Starred,
    )
    + (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Subscript, ast.Slice, ast.UnaryOp, ast.BinOp, ast.BoolOp)
    + (ast.Compare, ast.IfExp)
    + tuple(k for base in (ast.unaryop, ast.operator, ast.boolop, ast.cmpop) for k in base.__subclasses__())
)


class Allowed(Enum):
    """How much may be evaluated."""

    EVERYTHING = 0
    """No check: during imports, and for handlers without evaluation checks (templates)."""
    EXPRESSIONS = 1
    """In a worker that scores one answer: expressions without attributes, reserved names and definitions."""
    PURE_EXPRESSIONS = 2
    """In a worker that scores further answers: only literals, operators and calls of known constructors."""


class EvaluationRefused(Exception):
    """The text to evaluate is more than an expression."""


class Evaluations:
    """The audit hook of a process; it cannot be removed, and forked processes inherit it."""

    def __init__(self) -> None:
        self.allowed = Allowed.EVERYTHING
        self.refused = False
        """Whether something has been refused since this was last set to false."""
        self._is_reading = False
        self._known: set[tuple[Allowed, str]] = set()
        """Accepted texts: a compilation raises the event twice, and references recur."""
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if event != "compile" or self._is_reading or self.allowed is Allowed.EVERYTHING:
            return
        source, file = arguments[:2]
        if isinstance(source, bytes):
            source = source.decode()
        if str(file).endswith(".py"):  # a late import; evaluated text has no file
            return
        if isinstance(source, str) and source.strip() == _SYMPY_PRELUDE:
            return
        if sys._getframe(1).f_globals.get("__name__") in _GENERATORS:
            return
        if isinstance(source, str) and (self.allowed, source) in self._known:
            return
        self._is_reading = True
        try:
            is_allowed = is_expression(source, pure=self.allowed is Allowed.PURE_EXPRESSIONS)
        finally:
            self._is_reading = False
        if not is_allowed:
            self.refused = True
            raise EvaluationRefused("the text to evaluate is more than an expression")
        if isinstance(source, str) and len(source) < _LONGEST_KNOWN:
            if len(self._known) == _MOST_KNOWN:
                self._known.clear()
            self._known.add((self.allowed, source))


def is_expression(source: str | ast.AST, pure: bool) -> bool:
    """Whether `source`, text or a syntax tree, is one expression as described in `Allowed`.

    Raises whatever Python's parser raises for text that it cannot parse (`SyntaxError`, `RecursionError`,
    ...), so that nothing compiles a text which this check did not understand. Text without letters is not
    parsed.
    """
    if isinstance(source, str):
        if len(source) > _LONGEST or _ENCODING.search(source):
            return False
        if _WITHOUT_NAMES.fullmatch(source):
            return True
        source = ast.parse(source.lstrip(" \t"))
    if isinstance(source, ast.Module) and len(source.body) > 1:
        return False
    if not isinstance(source, ast.AST):
        return False
    for node in ast.walk(source):
        kind = type(node)
        if kind not in _NODES:
            return False
        if kind is ast.Name and not _may_name(node.id, pure):
            return False
        if kind is ast.Call and not _may_call(node.func, pure):
            return False
    return True


def _may_name(name: str, pure: bool) -> bool:
    if pure:  # a single letter that is not called is a variable of the formula, or a NameError
        return name in _PURE_CALLS or name in _CONSTANTS or len(name) == 1 and name.isalpha()
    return not name.startswith("_") and name not in _FORBIDDEN


def _may_call(function: ast.expr, pure: bool) -> bool:
    if isinstance(function, ast.Call):  # Function('f')(x)
        return True
    return isinstance(function, ast.Name) and (not pure or function.id in _PURE_CALLS)
