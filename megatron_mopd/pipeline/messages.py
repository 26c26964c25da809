"""Decides where each stage posts its receives and sends. Pure Python, no torch.

A send directly follows the computation whose result it sends. A receive can be posted anywhere before the
computation that needs it. If it is posted too late, its transfer is not hidden, or the sender waits. Too
early is worse if all kernels of a GPU share one hardware queue (`one_queue.py`): a receive starts only when
the previous message of its channel has arrived, and until then everything launched after it waits too,
perhaps for a computation that this very message depends on.

So the receive of message k is posted before the last computation that starts no later than the message is
sent, but after message k-1 has arrived, in the time of the schedule. Times can be equal, and in the run they
deviate, so the order in which the scheduler started the computations sets limits. Let X(k) be the computation
that produces message k. The receive is posted

1. before a computation that started after X(k-1),
2. after computations only that started before X(k+1),
3. between the same two barriers (optimizer step, `Synchronize`) as its send.

These limits exclude deadlocks with one hardware queue, whatever the durations. Between two barriers, rank
every computation by its place in the scheduler's order, a send like its computation, and a receive by the
later one of X(k-1) and the computation before it in its list. Then nothing waits for a higher rank: not the
receive (for the send of message k-1, and for what precedes it in its list), not the next send of the channel
(for this receive, by 2), not the computation after the receive (by 1). Waits between equal ranks lead from a
receive to a send and from there to its computation, which waits for lower ranks only. So waits form no cycle.
By 3, no message is on its way while all stages meet.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from megatron_mopd.pipeline.instructions import Channel, Compute, Instruction, Lane, Receive, Send, next_place
from megatron_mopd.pipeline.list_scheduling import Schedule

PerSlot = list[list[list[Instruction]]]
"""Instructions for each stage and each slot. A stage has one slot before each computation or barrier."""


def slot(position: int, barriers: Sequence[int]) -> int:
    """The slot before the computation at `position`; each barrier is before the computation at its own."""
    return position + bisect_right(barriers, position)


def place_messages(
    schedule: Schedule, computes: Sequence[Sequence[Compute]], barriers: Sequence[Sequence[int]]
) -> tuple[PerSlot, list[dict[int, Send]]]:
    """The receives of each stage by slot, and the send that follows the computation at a position.

    computes: the schedule's computations on each stage.
    barriers: for each stage, the positions of the computations that follow a barrier.
    """
    request = schedule.request
    p, v = request.stages, request.virtual_stages
    sends: list[dict[int, Send]] = [{} for _ in computes]
    channels: dict[Channel, list[int]] = {}
    for stage, mine in enumerate(computes):
        for position, compute in enumerate(mine):
            target = next_place(compute, stage, p, v)
            if target is not None:
                lane, destination, consumer = target
                channel = Channel(lane, stage, destination)
                sends[stage][position] = Send(channel, consumer)
                channels.setdefault(channel, []).append(position)

    started: list[list[int]] = [[] for _ in computes]
    for number, stage in enumerate(schedule.started):
        started[stage].append(number)
    starts = [[item.start for item in items] for items in schedule.placed]
    place = [{compute: position for position, compute in enumerate(mine)} for mine in computes]
    is_cache_limited = request.limits.cached_states is not None
    unordered: list[list[list[tuple[int, Receive]]]] = [
        [[] for _ in range(len(mine) + len(stops))] for mine, stops in zip(computes, barriers)
    ]
    for channel, positions in channels.items():
        source, destination = channel.source, channel.destination
        order, row, stops = started[destination], starts[destination], barriers[destination]
        own_order, own_items = started[source], schedule.placed[source]
        # A buffer of a limited cache must not be allocated before the computations have freed theirs whose
        # start allowed the sender to start.
        needs_room = is_cache_limited and channel.lane is Lane.TEACHER_FORWARD
        before, arrived = -1, 0.0
        for number, sender in enumerate(positions):
            consumer = sends[source][sender].consumer
            end = own_items[sender].end
            position = max(
                bisect_right(row, end) - 1,
                # Rounding must not exclude a computation that starts exactly when the message arrives.
                bisect_left(row, arrived * (1 - 1e-12)),
                bisect_right(order, own_order[sender] if needs_room else before),
            )
            latest = place[destination][consumer]
            if number + 1 < len(positions):
                latest = min(latest, bisect_right(order, own_order[positions[number + 1]]))
            where = slot(min(position, latest), stops)
            passed = bisect_right(barriers[source], sender)
            if passed:
                where = max(where, stops[passed - 1] + passed)
            if passed < len(stops):
                where = min(where, stops[passed] + passed)
            unordered[destination][where].append((before, Receive(channel, consumer)))
            before, arrived = own_order[sender], end + request.costs.message
    receives = [[_in_order(slot_) for slot_ in slots] for slots in unordered]
    return receives, sends


def _in_order(receives: list[tuple[int, Receive]]) -> list[Instruction]:
    """The receives of one slot: the one whose channel is free first comes first."""
    return [receive for _, receive in sorted(receives, key=lambda item: item[0])]
