"""A prompt, as all packages above see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_mopd.data.arrays import EqualByValue, id_array


@dataclass(frozen=True, eq=False)
class Prompt(EqualByValue):
    """A prompt, its domain and how a response to it is scored."""

    text: str | tuple[dict[str, str], ...] = field(hash=False)
    """The prompt as given: plain text, or chat messages with `role` and `content`."""
    token_ids: np.ndarray
    """[tokens] int32, what the model reads before the response. May be given as any sequence."""
    domain: str
    """Selects the teachers, and names the metrics."""
    answer: str | None
    """The reference answer, if there is one."""
    verifier: str
    """Name of the verifier that scores a response."""
    entry: dict[str, Any] | None = field(default=None, hash=False, repr=False)
    """The entry that a reasoning-gym task generated, with the task's `params`; `None` for prompts from a
    file."""
    index: int = 0
    """Index among all prompts that were loaded together."""
    origin: str = ""
    """File and line, or task and number, for error messages."""
    opens_thinking: bool = False
    """Whether the prompt ends inside `<think>`, as with some chat templates, so that the response begins
    there."""

    def __post_init__(self):
        object.__setattr__(self, "token_ids", id_array(self.token_ids))
