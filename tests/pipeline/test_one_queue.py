"""The model of a GPU with one hardware queue: the deadlocks that it finds, and plans without any."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.pipeline_queue import at_the_end, early
from benchmarks.pipeline_queue import requests as drawn
from megatron_mopd.pipeline.check import check_plan, find_problems
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.instructions import (
    Channel,
    Lane,
    OptimizerStep,
    Plan,
    Receive,
    Send,
    StudentBackward,
    StudentForward,
    Synchronize,
    TeacherForward,
)
from megatron_mopd.pipeline.one_queue import simulate_one_queue
from megatron_mopd.pipeline.plan import forward_lists, make_plan
from megatron_mopd.pipeline.problem import PlanRequest, ScoringTask, split_scoring
from megatron_mopd.pipeline.simulate import PlanError, simulate
from tests.pipeline.test_simulate import requests

ACTIVATIONS = Channel(Lane.STUDENT_FORWARD, 0, 1)
GRADIENTS = Channel(Lane.STUDENT_BACKWARD, 1, 0)
STATES = Channel(Lane.TEACHER_FORWARD, 0, 1)


def two_stages(first, second, microbatches=2, message=0.0, scoring=()):
    costs = CostModel.build(2, teacher_forward={"t": 1.0}, message=message)
    return Plan(PlanRequest(2, microbatches, costs, scoring=scoring), (tuple(first), tuple(second)))


def forward(i, channel=None):
    sends = [Send(channel, StudentForward(i))] if channel else []
    return [StudentForward(i), *sends]


def backward(i, channel=None):
    sends = [Send(channel, StudentBackward(i))] if channel else []
    return [StudentBackward(i), *sends]


def receive(channel, compute):
    return Receive(channel, compute)


LAST_STAGE = [
    receive(ACTIVATIONS, StudentForward(0)),
    *forward(0),
    *backward(0, GRADIENTS),
    receive(ACTIVATIONS, StudentForward(1)),
    *forward(1),
    *backward(1, GRADIENTS),
    OptimizerStep(),
]


def test_a_receive_that_cannot_start_holds_up_the_computation_that_it_depends_on():
    """The second gradient's receive waits for the first gradient, which needs the forward launched after it.
    With a queue for each stream the forward runs, so `simulate` finishes."""
    first = [
        receive(GRADIENTS, StudentBackward(0)),
        receive(GRADIENTS, StudentBackward(1)),
        *forward(0, ACTIVATIONS),
        *forward(1, ACTIVATIONS),
        *backward(0),
        *backward(1),
        OptimizerStep(),
    ]
    plan = two_stages(first, LAST_STAGE)
    assert not find_problems(plan)
    assert simulate(plan).total == 9
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    stuck = (
        "stage 0, instruction 1 (receive on student_backward 1->0 for student backward micro-batch 1 chunk 0)"
        " waits for stage 1 to send message 0 of this channel, and with one hardware queue everything after"
        " it waits too"
    )
    assert stuck in str(caught.value)
    waiting = (
        "stage 1, instruction 1 (student forward micro-batch 0 chunk 0) waits for message 0 from stage 0"
    )
    assert waiting in str(caught.value)
    # After the first forward has been sent, which is all that the first gradient needs, it does no harm.
    check_plan(two_stages([first[0], *first[2:4], first[1], *first[4:]], LAST_STAGE))


def test_a_send_that_cannot_start_holds_up_the_computation_that_its_receiver_waits_for():
    """The receiver posts late, after a forward whose input the sender launches after its sends."""
    ahead = ScoringTask("t", (0, 1), step=1)
    jobs = [TeacherForward(job) for job in ahead.pending()]
    teachers = [entry for job in jobs for entry in (job, Send(STATES, job))]
    received = [entry for job in jobs for entry in (receive(STATES, job), job)]
    first = [*teachers, *forward(0, ACTIVATIONS), receive(GRADIENTS, StudentBackward(0)), *backward(0)]
    start = [receive(ACTIVATIONS, StudentForward(0)), *forward(0), *backward(0, GRADIENTS)]
    end = [OptimizerStep()]
    late = two_stages(first + end, start + received + end, microbatches=1, scoring=(ahead,))
    simulate(late)
    with pytest.raises(
        PlanError,
        match=r"stage 0, instruction 3 \(send on teacher_forward 0->1 .* waits for "
        r"stage 1 to receive message 0 of this channel",
    ):
        simulate_one_queue(late)
    in_time = replace(late, stages=(late.stages[0], (*received[:1], *start, *received[1:], *end)))
    simulate_one_queue(in_time)


@pytest.mark.parametrize("order", [early, at_the_end])
def test_two_simple_orders_deadlock(order):
    """Receives posted when the sender starts its computation (the order of earlier versions), and directly
    before the computation that needs them."""
    plans = [make_plan(request, effort=0) for request in drawn(seed=0, count=30)]
    stuck = 0
    for plan in map(order, plans):
        simulate(plan)
        try:
            simulate_one_queue(plan)
        except PlanError:
            stuck += 1
    assert stuck > 3


def test_planned_orders_do_not_deadlock_and_cost_next_to_nothing():
    ratios = []
    for request in drawn(seed=0, count=30):
        plan = make_plan(request, effort=0)
        check_plan(plan)
        ratios.append(simulate_one_queue(plan).total / simulate(plan).total)
        if request.stages == 1:
            assert ratios[-1] == 1
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratios) / len(ratios) < 1.005 and max(ratios) < 1.15


def assert_no_message_crosses_a_meeting(plan):
    messages: dict = {}
    for entries in plan.stages:
        meetings = 0
        for entry in entries:
            if isinstance(entry, OptimizerStep | Synchronize):
                meetings += 1
            elif isinstance(entry, Send | Receive):
                messages.setdefault((type(entry), entry.channel, meetings), []).append(entry.consumer)
    for (kind, *where), consumers in messages.items():
        assert messages.get((Receive if kind is Send else Send, *where)) == consumers


def small(
    stages, microbatches, forward, backward, teachers, counts, *, kind="bubble_fill", scored=False, **costs
):
    """A request that scores its own step, or has it scored, and looks ahead by one step."""
    virtual_stages = len(forward) // stages
    costs = CostModel.build(
        stages,
        virtual_stages,
        student_forward=forward,
        student_backward=backward,
        teacher_forward=teachers,
        **costs,
    )
    scoring = split_scoring(counts, scored=scored) + split_scoring(counts, step=1)
    return PlanRequest(stages, microbatches, costs, virtual_stages, scoring, kind=kind)


# Each is violated if `messages.py` omits one of its limits 2 and 3. The times imply 1 in all plans tried.
LIMITS = {
    "a teacher's message before the optimizer step": small(
        2, 5, [3, 1.7], [0, 0.3], {"a": [0, 1], "b": [3, 1.7]}, {"a": 3, "b": 2}, message=1.0
    ),
    "the first forward after Synchronize": small(
        2, 1, [1, 1], [2, 2], {"a": 1.0}, {"a": 1}, kind="serial", scored=True, message=0.1, optimizer=0.5
    ),
    "equal times": small(
        3,
        2,
        [0, 0, 1, 0, 1, 0],
        [1.7, 3, 0, 1.7, 0, 0.3],
        {"a": [0, 0.3, 1.7]},
        {"a": 2},
        scored=True,
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_is_needed(name):
    plan = make_plan(LIMITS[name], effort=0)
    check_plan(plan)
    assert_no_message_crosses_a_meeting(plan)


def test_a_receive_is_not_posted_before_the_previous_message_has_arrived():
    """Messages that take as long as a forward: posted earlier, they would hold up computations."""
    teachers = {"a": [1.7, 0], "b": [1, 0.3]}
    request = small(2, 3, [1, 3], [1.7, 0], teachers, {"a": 2, "b": 1}, message=1.0)
    plan = make_plan(request, effort=0)
    assert simulate_one_queue(plan).total == pytest.approx(simulate(plan).total)


@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_teachers_in_the_bubbles_cost_nothing_more(virtual_stages):
    """p=8, m=32, T=F=1, B=2, the case of the README."""
    costs = CostModel.build(8, virtual_stages, teacher_forward={"a": 1.0, "b": 1.0})
    counts = {"a": 16, "b": 16}
    scoring = split_scoring(counts, scored=True) + split_scoring(counts, step=1)
    plan = make_plan(PlanRequest(8, 32, costs, virtual_stages, scoring), effort=0)
    assert simulate_one_queue(plan).total == pytest.approx(simulate(plan).total)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(requests())
def test_random_plans_complete_with_any_durations(request):
    """Also when many durations are 0, so that the order of the scheduler decides; and no message is on its
    way while all stages meet."""
    plan = make_plan(request, effort=0)
    assert not find_problems(plan)
    simulate_one_queue([plan, plan])
    assert_no_message_crosses_a_meeting(plan)


@pytest.mark.parametrize("virtual_stages", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 7, 16])
def test_forward_passes_do_not_deadlock(stages, virtual_stages, microbatches):
    request = PlanRequest(stages, microbatches, CostModel.build(stages, virtual_stages), virtual_stages)
    simulate_one_queue(Plan(request, forward_lists(stages, virtual_stages, microbatches)))


def test_a_message_starts_when_the_previous_one_of_its_channel_has_arrived():
    """And the computation after it starts no earlier. With a queue for each stream messages overlap."""
    first = [*forward(0, ACTIVATIONS), *forward(1, ACTIVATIONS)]
    second = [
        receive(ACTIVATIONS, StudentForward(0)),
        receive(ACTIVATIONS, StudentForward(1)),
        *forward(0),
        *forward(1),
    ]
    plan = two_stages(first, second, message=3.0)
    assert simulate_one_queue(plan).finish == [4, 8]
    assert simulate(plan).finish == [2, 6]
