"""Which teachers, or output heads, are loaded into which slot, and when. No torch."""

from __future__ import annotations

import math
from typing import NamedTuple


class SlotLoad(NamedTuple):
    """Load `teacher` into `slot` once use number `after` (-1: at once) is over; use number `before` needs it
    (one more than there are: the next plan does).
    """

    teacher: str
    slot: int
    after: int
    before: int


def slot_loads(uses: list[tuple[str, ...]], slots: int, resident: tuple[str, ...], following: str = ""):
    """Which loads serve a sequence of uses with so many slots, each at the earliest moment.

    A load takes the slot whose occupant is needed last, but not the one in use just before while another can
    give way: it could only begin when that use is over, and nothing would hide it. `following` is what the
    next plan begins with; it is brought in as soon as a slot is free for good. Returns the loads in the order
    they are started and the occupants at the end.
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
