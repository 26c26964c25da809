"""The mean of a per-token quantity over the last steps, and how far chance may have moved it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

ENOUGH_TOKENS = 1000
"""Tokens whose mean is worth comparing."""
FEWEST_STEPS = 8
"""Steps that a standard error is estimated from."""
MOST_STEPS = 64
"""Steps that are kept; where they have fewer than `ENOUGH_TOKENS` together, they do."""
SURE = 4.0
"""Standard errors that chance does not exceed: 1e-3 two-sided for eight steps, 1e-4 for many."""


class RecentMean:
    """Means of steps, with the number of tokens of each. The standard error comes from how the steps' means
    scatter, so that it includes what the tokens of one response have in common."""

    def __init__(self, steps: Iterable[Sequence[float]] = ()):
        self._steps: deque[tuple[float, float]] = deque((tuple(step) for step in steps), maxlen=MOST_STEPS)

    def add(self, value: float, tokens: float) -> None:
        """One step's mean over `tokens`; infinitely many make it exact."""
        self._steps.append((value, tokens))

    def state(self) -> list[list[float]]:
        """What the constructor takes, in plain containers."""
        return [list(step) for step in self._steps]

    def bounds(self) -> tuple[float, float, float] | None:
        """Mean, and lower and upper end of where chance may have moved it from, over the last `FEWEST_STEPS`
        and `ENOUGH_TOKENS` at least; `None` while there are not so many."""
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
