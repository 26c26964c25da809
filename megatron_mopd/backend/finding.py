"""Findings of an examination of the machine: one line each, with advice if action is needed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """Severity of a finding; only a problem prevents training."""

    OK = 0
    NOTE = 1
    WARNING = 2
    PROBLEM = 3


@dataclass(frozen=True)
class Finding:
    """One fact about one subject."""

    level: Level
    subject: str
    text: str
    advice: str = ""
    """What to do; empty if nothing."""


def worst(findings: list[Finding]) -> Level:
    """The highest level among the findings."""
    return max((finding.level for finding in findings), default=Level.OK)
