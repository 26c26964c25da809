"""Runs that go wrong without an error: wrong checkpoints, rewards that say nothing; and combinations with a
wrong gradient, which the configuration refuses."""

import math

import pytest

from megatron_mopd.config import ConfigError, TeacherConfig, config_from_dict
from megatron_mopd.teachers.routing import Routing
from megatron_mopd.training.guards import first_step_alarms
from megatron_mopd.training.monitors import FEWEST_VERDICTS, GRADIENT_SPIKE, KL_CEILING, Alarms
from tests._models import trajectory

TEACHERS = [TeacherConfig("expert", "e"), TeacherConfig("other", "o", kl_floor=0.01, kl_ceiling=9.0)]
ROUTING = Routing({"math": "expert", "code": {"expert": 0.5, "other": 0.5}}, TEACHERS)


def test_a_teacher_that_equals_the_student_at_the_first_step():
    assert first_step_alarms({"kl/math": 0.04, "kl/code": 0.2, "loss": 0.0}, ROUTING, TEACHERS) == []
    (alarm,) = first_step_alarms({"kl/math": 0.04, "kl/code": 1e-9}, ROUTING, TEACHERS)
    assert "expert + other" in alarm and "'code'" in alarm


def test_the_limits_are_each_teachers_own_and_apply_to_a_mean_over_weights():
    routing = Routing(
        {"math": {"other": 2.0}, "code": "expert", "chat": "self"}, [*TEACHERS, TeacherConfig("self")]
    )
    limits = [*TEACHERS, TeacherConfig("self")]
    assert first_step_alarms({"kl/math": 17.0, "kl/code": 4.9, "kl/chat": 0.0}, routing, limits) == []
    (alarm,) = first_step_alarms({"kl/math": 0.015}, routing, limits)
    assert "other equals the student" in alarm
    (alarm,) = first_step_alarms({"kl/code": 5.1}, routing, limits)
    assert "expert is far from the student" in alarm


def test_a_teacher_that_has_nothing_in_common_with_the_student():
    alarms = Alarms()
    assert alarms.step({"kl/math": 0.2, "loss": 9.0}) == []
    (alarm,) = Alarms().step({"kl/math": 2 * KL_CEILING})
    assert "'math'" in alarm and "is its teacher the right one?" in alarm


def test_a_gradient_unlike_the_others():
    alarms = Alarms()
    norms = [2.0, 1.0, 0.9, 1.1, 0.2 * GRADIENT_SPIKE, 3 * GRADIENT_SPIKE, math.nan, 1.0, 4 * GRADIENT_SPIKE]
    said = [alarms.step({"grad_norm": norm}) for norm in norms]
    assert [len(messages) for messages in said] == [0, 0, 0, 0, 0, 1, 0, 0, 1]
    assert "the gradient's norm is 90" in said[5][0] and "broken hardware" in said[5][0]
    assert Alarms().step({"grad_norm": 1e6}) == []  # nothing to compare the first steps with

    resumed = Alarms()
    resumed.load_state_dict(alarms.state_dict())
    assert resumed.step({"grad_norm": 1.0}) == [] and len(resumed.step({"grad_norm": 1e6})) == 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rewards_that_are_all_the_same(value):
    """A parser that understands no answer gives 0 to all of them, and nothing fails."""
    batch = [trajectory(index, [1], [2], "math") for index in range(FEWEST_VERDICTS // 2 + 1)]
    constant = {t.index: value for t in batch}
    alarms = Alarms()
    assert alarms.rollout(batch, constant, {}) == []
    (alarm,) = alarms.rollout(batch, constant, {})
    assert "'math'" in alarm and f"are all {value}" in alarm
    mixed = constant | {0: 0.5}
    assert alarms.rollout(batch, mixed, {}) == []


@pytest.mark.parametrize(
    "kind, apply_as, why",
    [
        ("full_vocab_kl", "advantage", "expected gradient of a divergence is zero"),
        ("jsd", "advantage", "expected gradient of a divergence is zero"),
        ("sampled_token", "loss", "does not depend on the teacher"),
    ],
)
def test_combinations_with_a_wrong_gradient_are_refused(kind, apply_as, why):
    with pytest.raises(ConfigError, match="objective.apply_as") as raised:
        config_from_dict({"run_dir": "unused", "objective": {"kind": kind, "apply_as": apply_as}})
    assert why in str(raised.value)
    right = {"advantage": "loss", "loss": "advantage"}[apply_as]
    config_from_dict({"run_dir": "unused", "objective": {"kind": kind, "apply_as": right}})
