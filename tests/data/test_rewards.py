"""Rewards in worker processes: order, verifiers that fail or hang, and submission without waiting."""

import pytest

from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.reward_workers import RewardWorkers, scores_of


def prompt(answer, verifier="exact_match", entry=None):
    return Prompt("", (1,), "d", answer, verifier, entry)


@pytest.fixture(scope="module")
def workers():
    pool = RewardWorkers(workers=1, timeout_seconds=3.0)
    yield pool
    pool.close()


def test_scores_come_back_in_order(workers):
    pairs = [(prompt(str(i)), str(i if i % 3 else -1)) for i in range(50)]
    assert [s.raw for s in scores_of(workers.submit(pairs))] == [float(bool(i % 3)) for i in range(50)]


def test_a_verifier_that_hangs_or_crashes_costs_one_reward(workers):
    """The sample stays, its reward is missing and counted; the samples after it are scored."""
    pairs = [
        (prompt("4", "math_verify"), "4"),
        (prompt("4", "math_verify"), "9**9**9**9"),
        (prompt("x", "reasoning_gym", {"question": "?"}), "4"),
        (prompt("4", "no such verifier"), "4"),
        (prompt(None), "4"),
        (prompt("5", "math_verify"), "5"),
    ]
    futures = workers.submit(pairs)
    assert not futures[0].done(), "submitting must not wait for a verifier, and one hangs for 3 s"
    scores = scores_of(futures)
    assert [s.raw for s in scores] == [1.0, None, None, None, None, 1.0]
    assert [s.crashed for s in scores] == [False, True, True, True, False, False]
