"""Describes a teacher's micro-batches to the planner: who needs their results, and where its head is read."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from megatron_mopd.data.division import Cut
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.pipeline.problem import ScoringTask


def scoring_task(
    teacher: str,
    scored: Cut,
    student: Cut,
    keeps_log_probs: Callable[[Trajectory], bool] = lambda _: False,
) -> ScoringTask:
    """Which student micro-batches need each micro-batch of a teacher, on any data-parallel rank, and where
    its LM head is read. scored, student: cuts of the same division.

    For trajectories with `keeps_log_probs` the teacher's forward pass reads the head, for the others the
    student's loss. First uses strictly increase, because two micro-batches of a teacher hold more than one
    of the student's could.
    """
    place = {t.index: number for number, row in enumerate(student.rows) for part in row for t in part}
    uses: list[list[int]] = []
    scoring: list[bool] = []
    losses: set[int] = set()
    for row in scored.rows:
        members = [t for part in row for t in part]
        uses.append([place[t.index] for t in members])
        scoring.append(any(map(keeps_log_probs, members)))
        losses |= {place[t.index] for t in members if not keeps_log_probs(t)}
    firsts = tuple(map(min, uses))
    return ScoringTask(
        teacher,
        firsts,
        last_uses=tuple(map(max, uses)),
        scoring_heads=tuple(itertools.compress(firsts, scoring)),
        loss_heads=tuple(sorted(losses)),
        sizes=scored.sizes,
    )
