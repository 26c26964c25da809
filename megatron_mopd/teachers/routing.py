"""Maps each domain to weighted teachers.

    routing:
      math: math_expert                                  # one teacher
      code/python: {code_expert: 0.8, self: 0.2}         # several, weighted
      code/*: {code_expert: 1}                           # every other domain that starts with code/
      chat: {chat_expert: {0: 1.0, 200: 0.5}, self: {0: 0.0, 200: 0.5}}   # changing with the iteration
      default: self                                      # every domain not listed

A domain uses its own entry, else the matching wildcard entry with the most literal characters, else
`default`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from megatron_mopd.config import ConfigError, TeacherConfig, nearest

# A sample's teachers and their weights, sorted by name. Hashable, so that batches can be ordered by it.
Mixture = tuple[tuple[str, float], ...]

SELF = "self"
DEFAULT = "default"

_Schedule = tuple[tuple[int, float], ...]
"""(iteration, weight) with increasing iterations: linear between them, constant before and after."""


class Routing:
    """The teachers that score each domain, and their weights, at one iteration (initially 0; see `at`).

    The loss of a sample is sum_k w_k KL(student || teacher_k) (DeepSeek-V4, 5.1.2); weights are not
    normalized. Weights depend only on the iteration, so a resumed run continues exactly. A teacher with
    weight 0 does not score.
    """

    def __init__(self, routing: Mapping[str, Any], teachers: Iterable[TeacherConfig]):
        self.teacher_names = [teacher.name for teacher in teachers]
        self._entries = {str(domain): self._parse(str(domain), entry) for domain, entry in routing.items()}
        # Most literal characters first; ties keep the order of the configuration.
        patterns = [name for name in self._entries if _is_pattern(name)]
        self._patterns = sorted(patterns, key=lambda name: -sum(char not in "*?" for char in name))
        self._iteration = 0

    def at(self, iteration: int) -> Routing:
        """The same routing with the weights of `iteration` (the number of completed optimizer steps)."""
        other = copy.copy(self)
        other._iteration = iteration
        return other

    def mixture(self, domain: str) -> Mixture:
        """The teachers of `domain` with their weights; `ConfigError` if it has no entry."""
        entry = self._entry_of(domain)
        if entry is None:
            raise ConfigError(f"routing: domain {domain!r} has no teacher and there is no routing.{DEFAULT}")
        weights = ((name, _weight_at(schedule, self._iteration)) for name, schedule in self._entries[entry])
        return tuple((name, weight) for name, weight in weights if weight > 0)

    def scorers(self, domains: Iterable[str]) -> set[str]:
        """The teachers that score these domains at some iteration."""
        entries = {self._entry_of(domain) for domain in domains} - {None}
        return {name for entry in entries for name, _ in self._entries[entry]}

    @property
    def max_teachers(self) -> int:
        """Maximum number of teachers of one sample, at any iteration."""
        return max(map(len, self._entries.values()), default=1)

    def check(self, domains: Iterable[str], scored: Iterable[str] | None = None) -> None:
        """Raise `ConfigError` unless every domain in `scored` (default: all) has a teacher and every entry
        matches an existing domain."""
        domains = set(domains)
        for domain in sorted(domains if scored is None else scored):
            self.mixture(domain)
        for entry in self._entries:
            if entry == DEFAULT or entry in domains:
                continue
            if not _is_pattern(entry):
                raise ConfigError(f"routing.{entry}: no prompt has this domain{nearest(entry, domains)}")
            if not any(fnmatchcase(domain, entry) for domain in domains):
                raise ConfigError(
                    f"routing.{entry}: matches no domain of the prompts ({', '.join(sorted(domains))})"
                )

    def _entry_of(self, domain: str) -> str | None:
        if domain in self._entries:
            return domain
        matching = (pattern for pattern in self._patterns if fnmatchcase(domain, pattern))
        return next(matching, DEFAULT if DEFAULT in self._entries else None)

    def _parse(self, domain: str, entry: Any) -> tuple[tuple[str, _Schedule], ...]:
        where = f"routing.{domain}"
        if isinstance(entry, str):
            entry = {entry: 1.0}
        if not isinstance(entry, Mapping) or not entry:
            raise ConfigError(
                f"{where}: expected a teacher's name or a mapping name -> weight, found {entry!r}"
            )
        schedules: dict[str, _Schedule] = {}
        for name, weight in entry.items():
            if name not in self.teacher_names:
                raise ConfigError(
                    f"{where}: unknown teacher {name!r}{nearest(str(name), self.teacher_names)}"
                )
            schedules[name] = _parse_schedule(weight, f"{where}.{name}")
        used = {name: schedule for name, schedule in schedules.items() if any(w > 0 for _, w in schedule)}
        for iteration in sorted({i for schedule in schedules.values() for i, _ in schedule}):
            # Weights are piecewise linear and not negative, so their sum can only vanish at one of these
            # iterations.
            if not any(_weight_at(schedule, iteration) > 0 for schedule in used.values()):
                when = f" at iteration {iteration}" if used else ""
                raise ConfigError(
                    f"{where}: all weights are zero{when}; give at least one teacher a weight above 0"
                )
        return tuple(sorted(used.items()))


def _parse_schedule(weight: Any, where: str) -> _Schedule:
    if not isinstance(weight, Mapping):
        return ((0, _parse_weight(weight, where)),)
    points = {}
    for iteration, value in weight.items():
        if not str(iteration).isdigit():
            raise ConfigError(
                f"{where}: expected a weight or a mapping iteration -> weight, found {iteration!r}"
            )
        points[int(iteration)] = _parse_weight(value, f"{where}.{iteration}")
    if not points:
        raise ConfigError(f"{where}: expected at least one iteration -> weight")
    return tuple(sorted(points.items()))


def _parse_weight(weight: Any, where: str) -> float:
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight < float("inf"):
        raise ConfigError(f"{where}: expected a weight of at least 0, found {weight!r}")
    return float(weight)


def _weight_at(schedule: _Schedule, iteration: int) -> float:
    for (start, before), (end, after) in pairwise(schedule):
        if start <= iteration < end:
            return before + (after - before) * (iteration - start) / (end - start)
    return schedule[0][1] if iteration < schedule[0][0] else schedule[-1][1]


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


def check_teachers(teachers: list[TeacherConfig]) -> None:
    """Raise `ConfigError` unless names are present and unique, and every teacher but `self` has a
    checkpoint."""
    seen: set[str] = set()
    for number, teacher in enumerate(teachers):
        if not teacher.name:
            raise ConfigError(f"teachers[{number}].name: missing")
        if teacher.name in seen:
            raise ConfigError(f"teachers[{number}].name: {teacher.name!r} is used twice")
        seen.add(teacher.name)
        if teacher.name == SELF and teacher.load is not None:
            raise ConfigError("teachers: 'self' is the student at the start of the run and takes no `load`")
        if teacher.name != SELF and teacher.load is None:
            raise ConfigError(
                f"teachers[{number}].load: missing; name the checkpoint directory of {teacher.name!r}"
            )
        if not 0 <= teacher.kl_floor < teacher.kl_ceiling:
            raise ConfigError(
                f"teachers[{number}]: needs 0 <= kl_floor < kl_ceiling, found {teacher.kl_floor} and "
                f"{teacher.kl_ceiling}"
            )
