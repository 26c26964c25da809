"""Findings of an examination of the machine: one line each, with advice if action is needed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import IntEnum

from megatron_mopd.backend.messages import visible


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


_MARKS = {Level.OK: "ok", Level.NOTE: "note", Level.WARNING: "WARNING", Level.PROBLEM: "PROBLEM"}


def show(section: str, findings: list[Finding]) -> None:
    """Print the findings of one section, each followed by its advice, if any."""
    print(f"\n{section}")
    for finding in findings:
        print(f"  {_MARKS[finding.level]:8} {visible(finding.subject)}: {visible(finding.text)}")
        if finding.advice:
            print(f"           -> {visible(finding.advice)}")
    sys.stdout.flush()


def summary(findings: list[Finding]) -> str:
    """The last line: whether training can start."""
    counts = {level: sum(finding.level == level for finding in findings) for level in Level}
    problems, remarks = counts[Level.PROBLEM], counts[Level.WARNING]
    warned = f"{remarks} warning{'s' * (remarks != 1)}"
    if problems:
        return f"{problems} problem{'s' * (problems != 1)} will stop training, {warned}"
    return f"healthy: nothing here will stop training, {warned}"
