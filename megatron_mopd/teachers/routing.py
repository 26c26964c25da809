"""Domain -> weighted teachers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_mopd.config import ConfigError, TeacherConfig, nearest

# A sample's teachers with their weights, sorted by name: hashable, so that batches can be ordered by it.
Mixture = tuple[tuple[str, float], ...]

SELF = "self"


class Routing:
    """Which teachers score a domain, and with which weights.

    The loss of a sample is sum_k w_k KL(student || teacher_k) (DeepSeek-V4, 5.1.2); weights are used as
    given.
    """

    def __init__(self, routing: Mapping[str, Any], teachers: Iterable[TeacherConfig]):
        self.teacher_names = [teacher.name for teacher in teachers]
        self._mixtures = {domain: self._parse(domain, entry) for domain, entry in routing.items()}

    def _parse(self, domain: str, entry: Any) -> Mixture:
        if isinstance(entry, str):
            entry = {entry: 1.0}
        if not isinstance(entry, Mapping) or not entry:
            raise ConfigError(
                f"routing.{domain}: expected a teacher's name or a mapping name -> weight, found {entry!r}"
            )
        for name, weight in entry.items():
            if name not in self.teacher_names:
                raise ConfigError(
                    f"routing.{domain}: unknown teacher {name!r}{nearest(name, self.teacher_names)}"
                )
            if (
                isinstance(weight, bool)
                or not isinstance(weight, (int, float))
                or not 0 <= weight < float("inf")
            ):
                raise ConfigError(
                    f"routing.{domain}.{name}: expected a weight of at least 0, found {weight!r}"
                )
        mixture = tuple(sorted((str(name), float(weight)) for name, weight in entry.items() if weight > 0))
        if not mixture:
            raise ConfigError(
                f"routing.{domain}: all weights are zero; give at least one teacher a weight above 0"
            )
        return mixture

    @property
    def max_teachers(self) -> int:
        """Most teachers of one sample."""
        return max((len(mixture) for mixture in self._mixtures.values()), default=1)

    def mixture(self, domain: str) -> Mixture:
        """The teachers of `domain`, or the default's; `ConfigError` when there is neither."""
        mixture = self._mixtures.get(domain) or self._mixtures.get("default")
        if mixture is None:
            raise ConfigError(f"routing: domain {domain!r} has no teacher and there is no routing.default")
        return mixture

    def check(self, domains: Iterable[str], scored: Iterable[str] | None = None) -> None:
        """Every domain that teachers score (default: all) has one, and every entry names a domain that
        exists; `ConfigError` otherwise."""
        domains = set(domains)
        for domain in domains if scored is None else scored:
            self.mixture(domain)
        for domain in self._mixtures:
            if domain not in domains | {"default"}:
                raise ConfigError(f"routing.{domain}: no prompt has this domain{nearest(domain, domains)}")


def check_teachers(teachers: list[TeacherConfig]) -> None:
    """Names are there and unique; every teacher but `self` names a checkpoint."""
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
