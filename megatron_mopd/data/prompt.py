"""One prompt, as every room above sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt, its domain and how a response to it is scored."""

    text: str | tuple[dict[str, str], ...] = field(hash=False)
    """The prompt as written: plain text, or chat messages of `role` and `content`."""
    token_ids: tuple[int, ...]
    """What the model reads before the first token of the response."""
    domain: str
    """Picks the teachers, and names the metrics."""
    answer: str | None
    """The reference answer, where there is one."""
    verifier: str
    """Name of the verifier that scores a response."""
    entry: dict[str, Any] | None = field(default=None, hash=False, repr=False)
    """What a reasoning-gym task made, and the task's `params`; `None` for prompts from a file."""
    index: int = 0
    """Position among all prompts that were loaded together."""
    origin: str = ""
    """File and line, or task and number, for error messages."""
    opens_thinking: bool = False
    """Whether the prompt ends inside `<think>`, as some chat templates do: the response begins there."""
