"""Compare chat templates: which part of their text matters, and where two of them differ. Nothing is rendered
here (`rendering.py` does that, in a confined process).
"""

from __future__ import annotations

import functools
import os
from itertools import zip_longest

import jinja2

from megatron_mopd.backend.messages import visible

_LONGEST_PART = 40


@functools.lru_cache(maxsize=64)
def template_meaning(template: str | None) -> str | None:
    """A text that is equal for templates that differ only in what Jinja ignores: comments, whitespace inside
    tags, the kind of quotation marks, the final newline.

    It is the parsed template. A template that cannot be parsed here is returned unchanged: an invalid one, or
    one with tags specific to `transformers` (`{% generation %}`).
    """
    if template is None:
        return None
    # The same options as in transformers. Parsing executes nothing.
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        return repr(environment.parse(template))
    except (jinja2.TemplateError, RecursionError, ValueError, OverflowError):
        return template


def differing_line(theirs: str | None, ours: str | None) -> str:
    """The first line in which two chat templates differ, as one phrase for a message."""
    if theirs is None:
        return "it has no chat template"
    if ours is None:
        return "it has a chat template, data.tokenizer has none"
    # Split only at line feeds, so that a final newline counts as a line that the other one lacks.
    for number, (there, here) in enumerate(zip_longest(theirs.split("\n"), ours.split("\n")), start=1):
        if there == here:
            continue
        if "" in (there, here) and None in (there, here):
            verb = "ends" if here is None else "does not end"
            return f"its chat template {verb} with a newline"
        return f"line {number} of its chat template is {_part(there, here)}, not {_part(here, there)}"
    return "its chat template is the same"


def _part(line: str | None, other: str | None) -> str:
    """A line, from shortly before the first character in which it differs from the other one."""
    if line is None:
        return "missing"
    start = max(0, len(os.path.commonprefix([line, other or ""])) - 10)
    text = ("..." if start else "") + line[start : start + _LONGEST_PART]
    return visible(repr(text + "..." if len(line) > start + _LONGEST_PART else text))
