"""Assigns teachers, or output heads, to slots and schedules their loads. No torch."""

from __future__ import annotations

import math
from typing import NamedTuple


class SlotLoad(NamedTuple):
    """Load `teacher` into `slot` after use number `after` (-1: immediately); use number `before` needs it
    (the number of uses: the next plan needs it).
    """

    teacher: str
    slot: int
    after: int
    before: int


def slot_loads(uses: list[tuple[str, ...]], slots: int, resident: tuple[str, ...], following: str = ""):
    """The loads that serve a sequence of uses with this many slots, each as early as possible.

    A load takes the slot whose occupant is needed furthest in the future. It avoids the slot that the
    preceding use reads if another is available: the load could start only after that use, and nothing would
    hide it. `following` is the teacher that the next plan starts with; it is loaded as soon as a slot is no
    longer needed. Returns the loads in the order they start, and the final occupants.
    """
    occupant = list(resident) + [""] * (slots - len(resident))
    positions: dict[str, list[int]] = {}
    for number, teachers in enumerate(uses):
        for teacher in teachers:
            positions.setdefault(teacher, []).append(number)
    cursor = dict.fromkeys(positions, 0)
    last_use = [-1] * slots
    loads: list[SlotLoad] = []
    latest = -1

    def next_use(slot: int) -> float:
        name = occupant[slot]
        if name not in positions or cursor[name] >= len(positions[name]):
            return math.inf
        return positions[name][cursor[name]]

    def load(teacher: str, number: int, needed: tuple[str, ...]) -> None:
        nonlocal latest
        free = [slot for slot in range(slots) if occupant[slot] not in needed]
        idle = [slot for slot in free if number == 0 or last_use[slot] < number - 1]
        slot = max(idle or free, key=lambda s: (next_use(s), -last_use[s]))
        latest = max(latest, last_use[slot])
        occupant[slot] = teacher
        loads.append(SlotLoad(teacher, slot, latest, number))

    for number, teachers in enumerate(uses):
        for teacher in teachers:
            if teacher not in occupant:
                load(teacher, number, teachers)
        for teacher in teachers:
            last_use[occupant.index(teacher)] = number
            cursor[teacher] += 1
    if following and following not in occupant:
        load(following, len(uses), ())
    return loads, tuple(occupant)
