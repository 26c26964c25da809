"""All ranks agree on plans: those of a block are the same, those of different blocks need not be."""

from __future__ import annotations

import pytest
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.config import ConfigError
from megatron_mopd.pipeline.agreement import agree
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.plan import make_plan
from megatron_mopd.pipeline.problem import LimitError, PlanRequest, UnmetLimit
from megatron_mopd.pipeline.simulate import PlanError
from tests import _models
from tests._distributed import RankPool

PLANS = [make_plan(PlanRequest(1, count, CostModel.build(1)), effort=0) for count in (1, 2, 3)]
BLOCKS_OF_TWO = dict(teacher_block_size=2)
CASES = {
    # What each of four ranks has: the number of its plan, or a problem, and its sizes.
    "one plan per block": ([0, 0, 1, 1], ["", "", "", ""]),
    "another plan in a block": ([0, 0, 1, 2], ["", "", "", ""]),
    "first of a block differs": ([1, 0, 2, 2], ["", "", "", ""]),
    "other sizes": ([0, 0, 1, 1], ["", "", "", "x"]),
    "a problem": ([0, 0, ValueError("no room"), ValueError("no room")], ["", "", "", ""]),
    "a user's error": ([0, 0, ConfigError("parallel: mistake"), ValueError("no room")], ["", "", "", ""]),
    "limits": (
        [
            LimitError([UnmetLimit("activations", 1, 2), UnmetLimit("cached_states", 1, 3)]),
            LimitError([UnmetLimit("activations", 1, 2), UnmetLimit("cached_states", 1, 3)]),
            LimitError([UnmetLimit("activations", 1, 4), UnmetLimit("cached_states", 1, 2)]),
            0,
        ],
        ["", "", "", ""],
    ),
}


def outcome(rank, case):
    """The error of this rank: its type, text, and the limits that are not met; `None` if there is none."""
    groups = _models.groups_for(BLOCKS_OF_TWO)
    found, sizes = CASES[case]
    problem = found[rank] if isinstance(found[rank], Exception) else None
    plan = None if problem else PLANS[found[rank]]
    try:
        agree(groups, plan, problem, sizes[rank], state_bytes=10 * (rank // 2 + 1))
    except ValueError as error:
        limits = [tuple(limit) for limit in getattr(error, "unmet", ())]
        return type(error).__name__, str(error), limits, getattr(error, "state_bytes", None)
    return None


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as ranks:
        yield ranks


def test_blocks_may_have_different_plans(pool):
    assert pool.run(outcome, "one plan per block") == [None] * 4


@pytest.mark.parametrize(
    "case, kind, text",
    [
        (
            "another plan in a block",
            PlanError,
            "ranks [3] hold a different plan from the other 1 of their",
        ),
        ("first of a block differs", PlanError, "ranks [1] hold a different plan"),
        ("other sizes", PlanError, "ranks [3] hold a different plan"),
        ("a problem", PlanError, "ranks 2-3: no room"),
        ("a user's error", ConfigError, "parallel: mistake"),
    ],
)
def test_a_problem_of_one_block_is_raised_on_every_rank(pool, case, kind, text):
    for name, message, *_ in pool.run(outcome, case):
        assert name == kind.__name__ and text in message


def test_the_limits_reported_are_those_that_satisfy_every_block(pool):
    for name, _, unmet, state_bytes in pool.run(outcome, "limits"):
        assert name == "LimitError" and state_bytes == 20
        # Two states of 20 bytes need more than three of 10.
        assert unmet == [("activations", 1, 4), ("cached_states", 1, 2)]


def test_digests_of_different_blocks_do_not_cancel():
    """Every subset of ranks that deviates is found, whatever the block."""
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    cases = {
        f"{a}{b} in block {block}": [a, b, 0, 0] if block == 0 else [0, 0, a, b]
        for a, b in pairs
        for block in (0, 1)
    }
    CASES.update({name: (plans, [""] * 4) for name, plans in cases.items()})
    with RankPool(4) as ranks:
        for name in cases:
            assert {found[0] for found in ranks.run(outcome, name)} == {"PlanError"}
