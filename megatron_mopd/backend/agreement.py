"""Checks that all ranks start from the same software, settings and files, and reports which ranks differ.

Ranks on several hosts may read their own copies. A rank with different prompts or a different learning rate
would train without an error, but differently from the others.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mopd.backend.messages import visible
from megatron_mopd.config import ConfigError

_ERROR = "error"
_MOST_RANGES = 6
_LONGEST_SHOWN = 60


@dataclass(frozen=True)
class Fact:
    """Something that must be the same on every rank."""

    name: str
    """A key of the configuration, a package, a file."""
    value: str
    """The value to compare."""
    shown: str
    """The value as shown in a message; may differ between ranks that agree."""
    remedy: str = ""
    """How to fix a disagreement."""


def require_agreement(facts: Sequence[Fact], error: ConfigError | None = None) -> None:
    """Raise the same `ConfigError` on every rank unless all ranks pass the same facts and none an error.

    facts: in order of importance; the error names the first that differs, both values, and the ranks that
    have them. error: an error in this rank's inputs, found before all of its facts were known; it ranks after
    the known facts.

    Collectives, over all ranks, on the CPU: one all-reduce of 16 bytes. Only if ranks disagree: two
    all-gathers of 8 bytes per rank and two broadcasts of one rank's facts (a few kilobytes).
    """
    known = [*facts, Fact(_ERROR, str(error), str(error))] if error is not None else [*facts]
    if not _is_common(_digest([(fact.name, fact.value) for fact in known])):
        raise ConfigError(_disagreement({fact.name: fact for fact in known}))
    if error is not None:
        raise error


@dataclass(frozen=True)
class Problem:
    """What went wrong on at least one rank."""

    text: str
    """Of the first rank that has a problem."""
    rank: int
    count: int
    """Number of ranks with a problem."""


def first_problem(text: str | None) -> Problem | None:
    """The same on every rank: the problem of the first rank that has one; `None` if no rank does.

    Collectives, over all ranks, on the CPU: one all-reduce of 8 bytes. Only with a problem: another one and a
    broadcast of the text.
    """
    count = torch.tensor([int(text is not None)])
    dist.all_reduce(count)
    if not count.item():
        return None
    rank = torch.tensor([dist.get_world_size() if text is None else dist.get_rank()])
    dist.all_reduce(rank, dist.ReduceOp.MIN)
    told = [text]
    dist.broadcast_object_list(told, src=int(rank.item()))
    return Problem(told[0], int(rank.item()), int(count.item()))


def _digest(value: object) -> int:
    """63 bits of SHA-256, so that both the number and its negative fit an int64."""
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:8], "big") >> 1


def _is_common(digest: int) -> bool:
    """Whether every rank has the same number, i.e. the maximum equals the minimum."""
    extremes = torch.tensor([digest, -digest])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return extremes[0].item() == -extremes[1].item()


def _gathered(digest: int) -> list[int]:
    everywhere = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, torch.tensor([digest]))
    return [int(one) for one in everywhere]


def _disagreement(facts: dict[str, Fact]) -> str:
    """The message about the first fact in which rank 0 and another rank differ."""
    digests = _gathered(_digest([(fact.name, fact.value) for fact in facts.values()]))
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    (first, host_of_first), (second, host_of_second) = _told_by(0, facts), _told_by(other, facts)
    name = next(
        name
        for name in sorted({**first, **second}, key=lambda name: _place(name, first, second))
        if _value(first, name) != _value(second, name)
    )
    values = _gathered(_digest(_value(facts, name)))
    groups = [
        [rank for rank, value in enumerate(values) if value == values[reference]] for reference in (0, other)
    ]
    hosts = ["", ""] if host_of_first == host_of_second else [f" ({host_of_first})", f" ({host_of_second})"]
    sides = list(zip((first, second), groups, hosts))
    if name == _ERROR:
        # A rank without an error could read what another could not.
        told, ranks, host = next(side for side in sides if name in side[0])
        return f"{told[name].shown} (on {ranks_text(ranks)}{host})"
    described = [f"{_shown(told, name)} on {ranks_text(ranks)}{host}" for told, ranks, host in sides]
    remedy = (first.get(name) or second[name]).remedy
    return f"ranks differ in {visible(name)}: {', '.join(described)}; {remedy}"


def _told_by(rank: int, facts: dict[str, Fact]) -> tuple[dict[str, Fact], str]:
    """One rank's facts and host, on every rank."""
    told = [(facts, visible(socket.gethostname()))]
    dist.broadcast_object_list(told, src=rank)
    return told[0]


def _place(name: str, *sides: dict[str, Fact]) -> tuple[bool, int]:
    """Sort key: facts in their order, errors before facts that one side lacks."""
    missing = any(name not in side for side in sides) and name != _ERROR
    return missing, min(list(side).index(name) for side in sides if name in side)


def _value(facts: dict[str, Fact], name: str) -> str | None:
    return facts[name].value if name in facts else None


def _shown(facts: dict[str, Fact], name: str) -> str:
    if name not in facts:
        return "nothing"
    text = visible(facts[name].shown)
    return text if len(text) <= _LONGEST_SHOWN else f"...{text[-_LONGEST_SHOWN:]}"


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 2-7`."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    texts = [f"{a}" if a == b else f"{a}-{b}" for a, b in ranges[:_MOST_RANGES]]
    more = ", ..." if len(ranges) > _MOST_RANGES else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(texts)}{more}"
