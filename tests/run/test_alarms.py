"""Runs that go wrong without an error: wrong checkpoints, uninformative rewards. Also combinations with a
wrong gradient, which the configuration refuses."""

import dataclasses
import math
import random

import pytest

from megatron_mopd.config import ConfigError, TeacherConfig, config_from_dict
from megatron_mopd.run.alarms import (
    FEWEST_RESPONSES,
    FEWEST_VERDICTS,
    GRADIENT_SPIKE,
    KL_CEILING,
    Alarms,
)
from megatron_mopd.run.teacher_alarms import first_step_alarms
from megatron_mopd.teachers.routing import Routing
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
    """A parser that understands no answer scores all of them 0, and nothing fails."""
    batch = [trajectory(index, [1], [2], "math") for index in range(FEWEST_VERDICTS // 2 + 1)]
    constant = {t.index: value for t in batch}
    alarms = Alarms()
    assert alarms.rollout(batch, constant, {}) == []
    (alarm,) = alarms.rollout(batch, constant, {})
    assert "'math'" in alarm and f"are all {value}" in alarm
    mixed = constant | {0: 0.5}
    assert alarms.rollout(batch, mixed, {}) == []


def step_metrics(rng, domain, kl, entropy, tokens, **more):
    """A step's means of heavy-tailed values, as in a run, over so few tokens that they are mostly noise."""

    def mean(expected, sigma):
        return sum(expected * rng.lognormvariate(-sigma * sigma / 2, sigma) for _ in range(tokens)) / tokens

    found = {"kl": mean(kl, 1.5), "rollout_entropy": mean(entropy, 1.5), "tokens": tokens} | more
    return {f"{name}/{domain}": value for name, value in found.items()}


def healthy(rng, steps=200):
    """Metrics of a run with twelve experts and `self`: every KL falls except that of `self`, which rises from
    zero, and the student becomes as confident as its teachers."""
    domains = [
        (f"task{k}", rng.uniform(0.2, 2.5), rng.uniform(0.2, 1.2), rng.randint(30, 100)) for k in range(12)
    ]
    for number in range(steps):
        done = number / steps
        line = step_metrics(rng, "self", min(0.1, 0.004 * number), 0.5, 40)
        for domain, kl, entropy, tokens in domains:
            line |= step_metrics(rng, domain, kl * 0.03**done, entropy * 0.03**done, tokens)
        yield line


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_raises_none(seed):
    alarms, rng = Alarms(), random.Random(seed)
    assert [message for line in healthy(rng) for message in alarms.step(line)] == []


def steps_until_alarm(rng, change, after=50, longest=100):
    """Steps until a healthy domain raises an alarm after `change(steps since)` takes over its KL, entropy and
    other metrics; and the alarm. The run is interrupted and resumed in between."""
    alarms = Alarms()
    for _ in range(after):
        assert alarms.step(step_metrics(rng, "bad", 0.3, 0.5, 60)) == []
    resumed = Alarms()
    resumed.load_state_dict(alarms.state_dict())
    for number in range(longest):
        kl, entropy, more = change(number)
        if messages := resumed.step(step_metrics(rng, "bad", kl, entropy, 60, **more)):
            (message,) = messages
            assert "'bad'" in message
            return number + 1, message
    return None, ""


def test_a_student_that_moves_away():
    steps, message = steps_until_alarm(random.Random(1), lambda n: (0.3 * 1.2**n, 0.5, {}))
    assert steps < 40 and "the KL of domain 'bad' has grown" in message


def test_a_student_that_has_become_deterministic_where_its_teachers_have_not():
    collapse = lambda n: (0.6, 0.5 * 0.7**n, {})  # noqa: E731
    steps, message = steps_until_alarm(random.Random(2), collapse)
    assert steps < 60 and "the entropy of domain 'bad' fell from" in message and "of its teachers" in message
    as_sure_as_its_teachers = lambda n: (0.03, 0.5 * 0.7**n, {})  # noqa: E731
    assert steps_until_alarm(random.Random(2), as_sure_as_its_teachers) == (None, "")


@pytest.mark.parametrize("reward, sounds", [(0.1, True), (0.95, False)])
def test_a_deterministic_student_without_teachers(reward, sounds):
    """Rewards distinguish a student that has collapsed from one that has mastered its task."""
    alarms, rng, said = Alarms(), random.Random(3), []
    for number in range(120):
        line = step_metrics(rng, "math", 1.0, 0.5 * 0.9**number, 60, reward=reward)
        del line["kl/math"]
        said += alarms.step(line)
    assert len(said) == sounds and all("the entropy of domain 'math' fell" in message for message in said)


def test_responses_that_never_end():
    endless = [
        dataclasses.replace(trajectory(i, [1], [2], "math"), logprobs=(-1.0,), finished=False)
        for i in range(8)
    ]
    some = [dataclasses.replace(t, finished=True) if t.index < 2 else t for t in endless]
    alarms, said = Alarms(), []
    for _ in range(FEWEST_RESPONSES // 8):
        assert said == [], "an alarm after too few responses"
        said = alarms.rollout(endless, {}, {"unfinished/math": 1.0})
    assert len(said) == 1 and "100% of the responses of domain 'math' have no stop token" in said[0]
    assert not any(Alarms().rollout(some, {}, {"unfinished/math": 0.75}) for _ in range(50))


def test_a_mastered_task_is_no_broken_verifier():
    batch = [trajectory(index, [1], [2], "math") for index in range(FEWEST_VERDICTS)]
    alarms = Alarms()
    assert alarms.rollout(batch, {t.index: float(t.index % 10 < 8) for t in batch}, {}) == []
    assert alarms.rollout(batch, {t.index: 1.0 for t in batch}, {}) == [], "all answers are correct"
    (alarm,) = alarms.rollout(batch, {t.index: 0.0 for t in batch}, {})
    assert "are all 0.0" in alarm, "eight in ten were correct before"
    hard = Alarms()
    assert hard.rollout(batch, {t.index: float(t.index == 7) for t in batch}, {}) == []
    assert hard.rollout(batch, {t.index: 0.0 for t in batch}, {}) == [], "one in 256 was correct before"


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
