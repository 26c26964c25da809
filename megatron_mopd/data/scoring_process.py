"""Scores of verifiers that parse or evaluate an answer, from a confined process."""

from __future__ import annotations

from typing import Any

from megatron_mopd.confinement.process import ConfinedProcess, Unanswered


class ScoringProcess:
    """A confined process that scores (`data/scoring.py`), started when first needed."""

    def __init__(self) -> None:
        self._process = ConfinedProcess("megatron_mopd.data.scoring")

    def score(self, request: tuple[Any, ...], seconds: float) -> float | None:
        """The score for `verifiers.scoring_request`; `None` when the verifier raised, died or did not answer
        within `seconds`.
        """
        try:
            value = self._process.ask(*request, seconds=seconds)
        except Unanswered:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number else None

    def close(self) -> None:
        """End the process, if there is one."""
        self._process.close()
