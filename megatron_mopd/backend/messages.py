"""Makes untrusted text (files, prompts, names, models) safe to quote in messages, terminals and pages."""

from __future__ import annotations

import re
from typing import Any

_LONGEST_SHOWN = 40
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL = re.compile(f"[{_CONTROLS}]")
_CONTROL_IN_TEXT = re.compile(f"(?![\n\t])[{_CONTROLS}]")


def shown(value: Any) -> str:
    """A value in a message: its `repr` if short, else its kind. A key may hold anything by mistake."""
    if isinstance(value, (dict, list)) and value:
        return "a section" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 4 * _LONGEST_SHOWN:  # Python refuses to print some
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"a {type(value).__name__} of {len(text)} characters"


def visible(text: Any, keep_lines: bool = False) -> str:
    r"""`text` with all non-printing characters escaped: `\x1b`, `\r`, `\u202e`.

    Escapes control characters (C0, DEL, C1), which move a terminal's cursor, set its colors or inject input;
    bidirectional marks and overrides, which display text in a different order; line separators; and
    surrogates. keep_lines: keep line feeds and tabs, for text with several lines.
    """
    pattern = _CONTROL_IN_TEXT if keep_lines else _CONTROL
    return pattern.sub(lambda found: _ESCAPES.get(found[0]) or _escape(ord(found[0])), str(text))


_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
