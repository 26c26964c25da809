"""Alarms: things that are not errors yet, said while there is still time."""

from __future__ import annotations

from megatron_mopd.teachers.routing import SELF, Routing

TEACHER_EQUALS_STUDENT = 1e-6
"""Mean KL per token at the first step below which teacher and student are the same model."""


def first_step_alarms(metrics: dict[str, float], routing: Routing) -> list[str]:
    """Messages about teachers whose KL at the first step says that the wrong checkpoint was loaded."""
    alarms = []
    for key, value in metrics.items():
        if not key.startswith("kl/"):
            continue
        domain = key.removeprefix("kl/")
        experts = [name for name, _ in routing.mixture(domain) if name != SELF]
        if experts and value < TEACHER_EQUALS_STUDENT:
            alarms.append(
                f"teacher {' + '.join(experts)} equals the student on domain {domain!r} (KL {value:.1e} "
                "at the first step): is its checkpoint the right one?"
            )
    return alarms
