"""The mean of a per-token quantity over the most recent steps, with its confidence interval."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

ENOUGH_TOKENS = 1000
"""Tokens needed for a mean worth comparing."""
FEWEST_STEPS = 8
"""Steps needed to estimate a standard error."""
MOST_STEPS = 64
"""Steps that are kept; this many suffice even if together they have fewer than `ENOUGH_TOKENS`."""
SURE = 4.0
"""Half-width of the interval in standard errors: two-sided p of 1e-3 for eight steps, 1e-4 for many."""


class RecentMean:
    """Per-step means with their numbers of tokens. The standard error is estimated from the scatter of these
    means, so that it includes the correlation between the tokens of one response."""

    def __init__(self, steps: Iterable[Sequence[float]] = ()):
        self._steps: deque[tuple[float, float]] = deque((tuple(step) for step in steps), maxlen=MOST_STEPS)

    def add(self, value: float, tokens: float) -> None:
        """Add one step's mean over `tokens`; an infinite number marks it as exact."""
        self._steps.append((value, tokens))

    def state(self) -> list[list[float]]:
        """The constructor's argument, in plain containers."""
        return [list(step) for step in self._steps]

    def bounds(self) -> tuple[float, float, float] | None:
        """Mean, lower and upper bound over the most recent steps, at least `FEWEST_STEPS` of them with at
        least `ENOUGH_TOKENS`; `None` until there are that many."""
        if self._steps and math.isinf(self._steps[-1][1]):
            value = self._steps[-1][0]
            return value, value, value
        steps = self._last()
        if steps is None:
            return None
        total, count = sum(tokens for _, tokens in steps), len(steps)
        mean = math.fsum(value * tokens for value, tokens in steps) / total
        scatter = math.fsum((tokens * (value - mean)) ** 2 for value, tokens in steps)
        error = SURE * math.sqrt(scatter * count / (count - 1)) / total
        return mean, mean - error, mean + error

    def _last(self) -> list[tuple[float, float]] | None:
        taken, total = [], 0.0
        for step in reversed(self._steps):
            taken.append(step)
            total += step[1]
            if total >= ENOUGH_TOKENS and len(taken) >= FEWEST_STEPS:
                return taken
        return taken if len(taken) == MOST_STEPS else None
