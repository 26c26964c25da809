"""What messages, terminals and pages may quote of texts that others wrote: files, prompts, names, models."""

from __future__ import annotations

import re
from typing import Any

_LONGEST_SHOWN = 40
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL = re.compile(f"[{_CONTROLS}]")
_CONTROL_IN_TEXT = re.compile(f"(?![\n\t])[{_CONTROLS}]")


def shown(value: Any) -> str:
    """A value in a message: as it is when it is short, else its kind. A key may hold anything by mistake."""
    if isinstance(value, (dict, list)) and value:
        return "a section" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 4 * _LONGEST_SHOWN:  # Python refuses to spell some
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"a {type(value).__name__} of {len(text)} characters"


def visible(text: Any, keep_lines: bool = False) -> str:
    r"""`text` with everything escaped that would act instead of being seen: `\x1b`, `\r`, `\u202e`.

    Control characters (C0, DEL, C1), which move a terminal's cursor, colour it or answer in its user's name;
    marks and overrides of the writing direction, which show a text in another order than it has; separators
    of lines; halves of characters. keep_lines: line feeds and tabs stay, for what has several lines.
    """
    pattern = _CONTROL_IN_TEXT if keep_lines else _CONTROL
    return pattern.sub(lambda found: _ESCAPES.get(found[0]) or _escape(ord(found[0])), str(text))


_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
