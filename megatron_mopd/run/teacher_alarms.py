"""Early alarms about teachers: suspicious conditions that are not errors yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_mopd.config import TeacherConfig
from megatron_mopd.teachers.routing import SELF, Routing


def first_step_alarms(
    metrics: Mapping[str, float], routing: Routing, teachers: Iterable[TeacherConfig]
) -> list[str]:
    """Messages about teachers whose KL at the first step is outside [kl_floor, kl_ceiling].

    Below: the teacher equals the student. Above: a different tokenizer's ids or the wrong checkpoint.
    `metrics` has the mean per token of each domain (`kl/math`); for several weighted teachers it is the
    weighted sum, which is compared with their lowest floor and highest ceiling. `self` starts at 0 and has no
    floor.
    """
    limits = {teacher.name: teacher for teacher in teachers}
    alarms = []
    for key, value in metrics.items():
        if not key.startswith("kl/"):
            continue
        domain = key.removeprefix("kl/")
        mixture = routing.mixture(domain)
        value /= sum(weight for _, weight in mixture)
        names = [name for name, _ in mixture]
        experts = [name for name in names if name != SELF]
        if experts and abs(value) < min(limits[name].kl_floor for name in experts):
            alarms.append(
                f"teacher {' + '.join(experts)} equals the student on domain {domain!r} (KL {value:.1e} at "
                "the first step): is its checkpoint the right one?"
            )
        if value > max(limits[name].kl_ceiling for name in names):
            alarms.append(
                f"teacher {' + '.join(names)} is far from the student on domain {domain!r} (KL {value:.2f} "
                "at the first step): is it the right checkpoint, with the same tokenizer and chat template?"
            )
    return alarms
