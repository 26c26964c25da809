"""Run verifiers that parse or evaluate an answer in a confined process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_mopd.confinement.process import ConfinedProcess, Unanswered


class ScoringProcess:
    """A confined process that scores (`data/scoring.py`), started when first needed."""

    def __init__(self) -> None:
        self._process = ConfinedProcess("megatron_mopd.data.scoring")

    def score(self, requests: Sequence[tuple[Any, ...]], seconds: float) -> list[float | None]:
        """The scores for `verifiers.scoring_request`s, computed one after another; `None` where the verifier
        raised, died or did not finish within `seconds`.
        """
        try:
            values = self._process.ask_many(requests, seconds=seconds)
        except Unanswered:
            return [None] * len(requests)
        return [
            float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
            for value in values
        ]

    def close(self) -> None:
        """End the process, if it was started."""
        self._process.close()
