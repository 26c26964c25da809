"""What an examination of the machine found: one line each, with what to do where something is to be done."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """How much a finding matters; only a problem stops training."""

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
    """What to do; empty where nothing is to be done."""


def worst(findings: list[Finding]) -> Level:
    """The level of the gravest finding."""
    return max((finding.level for finding in findings), default=Level.OK)
