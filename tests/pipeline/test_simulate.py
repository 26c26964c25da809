"""The simulator against analytic times, the planner's targets, and random requests."""

import json
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mopd.commands import plan_pipeline
from megatron_mopd.pipeline.check import check_plan
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.instructions import TeacherForward
from megatron_mopd.pipeline.plan import Planner, bubble_free_time, make_plan
from megatron_mopd.pipeline.problem import KINDS, Limits, PlanRequest, ScoringTask, split_scoring
from megatron_mopd.pipeline.scenarios import (
    Workload,
    packed_ratio,
    rollout_batch_ratio,
    steady_state_ratio,
)
from megatron_mopd.pipeline.simulate import simulate
from megatron_mopd.pipeline.timeline import draw_timeline, idle_shares, write_chrome_trace


def workload(
    stages, microbatches, teacher_cost=1.0, virtual_stages=1, last_stage_extra=0.0, activations=None
):
    counts = {f"t{i}": microbatches // 4 for i in range(4)}
    forwards = [1 / virtual_stages] * (stages * virtual_stages)
    backwards = [2 / virtual_stages] * (stages * virtual_stages)
    forwards[-1] += last_stage_extra / 3
    backwards[-1] += last_stage_extra * 2 / 3
    costs = CostModel.build(
        stages,
        virtual_stages,
        student_forward=forwards,
        student_backward=backwards,
        teacher_forward=dict.fromkeys(counts, teacher_cost),
    )
    return Workload(stages, microbatches, costs, counts, virtual_stages, Limits(activations))


@pytest.mark.parametrize("virtual_stages", [1, 2, 4])
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_student_alone_takes_the_time_of_1f1b(stages, virtual_stages, groups):
    """(m + (p-1)/v) (F+B): the textbook time of 1F1B and of its interleaved form."""
    m = stages * groups
    plan = make_plan(PlanRequest(stages, m, CostModel.build(stages, virtual_stages), virtual_stages))
    result = simulate(plan)
    assert result.total == pytest.approx(3 * (m + (stages - 1) / virtual_stages))
    if virtual_stages == 1:
        assert result.peak_activations == [min(m, stages - stage) for stage in range(stages)]


def test_comparison_schedules_match_their_formulas():
    """p=8, m=32, T=F=1, B=2, four steps per rollout batch."""
    planner, work = Planner(), workload(8, 32)
    assert packed_ratio(planner, work) == pytest.approx((32 + 7) * 4 / 128)
    assert rollout_batch_ratio(planner, work, "serial") == pytest.approx(((4 * 32 + 7) + 4 * 39 * 3) / 512)
    assert rollout_batch_ratio(planner, work, "back_to_back") == pytest.approx((128 + 7 * 3) / 128)


@pytest.mark.parametrize(
    ("stages", "multiple", "teacher_cost", "virtual_stages", "last_stage_extra", "activations", "steady"),
    [
        (2, 4, 1.0, 1, 0.0, None, 1.02),
        (4, 4, 1.0, 1, 0.0, None, 1.02),
        (8, 4, 1.0, 1, 0.0, None, 1.02),
        (8, 8, 1.0, 1, 0.0, None, 1.02),
        (8, 2, 1.0, 1, 0.0, None, 1.12),
        (8, 4, 1.0, 1, 0.5, None, 1.02),
        (8, 4, 3.0, 1, 0.0, None, 1.06),
        (8, 4, 3.0, 1, 0.0, 12, 1.02),
        (4, 8, 0.3, 1, 0.0, None, 1.02),
        (4, 4, 1.0, 2, 0.0, None, 1.02),
        (4, 8, 3.0, 2, 0.0, None, 1.02),
        (4, 4, 0.3, 2, 0.0, None, 1.02),
    ],
)
def test_bubble_fill_meets_its_targets(
    stages, multiple, teacher_cost, virtual_stages, last_stage_extra, activations, steady
):
    planner = Planner(effort=60_000)
    work = workload(
        stages, stages * multiple, teacher_cost, virtual_stages, last_stage_extra, activations=activations
    )
    assert steady_state_ratio(planner, work) <= steady
    if multiple >= 4:
        assert rollout_batch_ratio(planner, work, "bubble_fill") <= 1.08


def test_cheap_teachers_leave_only_the_students_own_bubbles():
    work = workload(8, 32, 0.3)
    assert steady_state_ratio(Planner(effort=30_000), work) == pytest.approx(
        work.bound() / work.bubble_free(), rel=2e-3
    )


def test_loads_are_hidden_with_two_slots_and_not_with_one():
    counts = {f"t{i}": 8 for i in range(4)}
    costs = CostModel.build(
        4, teacher_forward=dict.fromkeys(counts, 1.0), teacher_load=dict.fromkeys(counts, 6.0)
    )
    times = {}
    for slots in (1, 2):
        request = PlanRequest(
            4,
            32,
            costs,
            scoring=split_scoring(counts),
            kind="back_to_back",
            limits=Limits(resident_teachers=slots),
        )
        times[slots] = simulate(make_plan(request)).total
    assert times[2] == pytest.approx(6 + 32 + 3 * (32 + 3))  # only the first load is waited for
    assert times[1] >= times[2] + 3 * 6


def test_messages_and_optimizer_take_their_time():
    costs = CostModel.build(2, message=0.25, optimizer=5.0)
    result = simulate(make_plan(PlanRequest(2, 1, costs)))
    assert result.optimizer_steps == [pytest.approx(2 * (1 + 2) + 2 * 0.25 + 5)]


def test_many_stages_in_seconds():
    started = time.process_time()  # the machine may be busy with other work
    costs = CostModel.build(1024, teacher_forward={"t": 1.0})
    groups = split_scoring({"t": 8}, scored=True) + split_scoring({"t": 8}, step=1)
    plan = make_plan(PlanRequest(1024, 8, costs, scoring=groups), effort=0)
    check_plan(plan)
    assert time.process_time() - started < 20


def test_timeline_picture_and_trace(tmp_path):
    plan = make_plan(
        PlanRequest(3, 4, CostModel.build(3, teacher_forward={"t": 1.0}), scoring=split_scoring({"t": 4}))
    )
    result = simulate(plan, record=True)
    assert idle_shares(result.events, 3) == pytest.approx(result.idle_share)
    draw_timeline({"planned": result.events, "measured": result.events}, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    write_chrome_trace({"planned": result.events}, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(entry["ph"] == "X" and entry["cat"] == "TeacherForward" for entry in trace) == 12
    with pytest.raises(ValueError, match="no events to draw"):
        draw_timeline({"empty": []}, tmp_path / "none.png")


def test_command_line_tool(tmp_path, capsys):
    picture, trace = tmp_path / "timeline.png", tmp_path / "trace.json"
    arguments = ["--stages", "2", "--microbatches", "4", "--teacher", "math=3", "--teacher", "code=1"]
    assert plan_pipeline.main([*arguments, "--picture", str(picture), "--trace", str(trace)]) == 0
    shown = capsys.readouterr().out
    for kind in ("bubble_fill", "back_to_back", "serial", "packed"):
        assert kind in shown
    assert picture.exists() and json.loads(trace.read_text())["traceEvents"]
    assert plan_pipeline.main([*arguments, "--cached-states", "0"]) == 2
    assert "smallest value that works is 1" in capsys.readouterr().err


# --- random requests ----------------------------------------------------------------------------------

duration = st.sampled_from([0.0, 0.3, 1.0, 1.7, 3.0])


@st.composite
def requests(draw, stages=(1, 2, 3, 4, 5, 6)):
    p, v, m = draw(st.sampled_from(stages)), draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 12))
    names = [f"t{i}" for i in range(draw(st.integers(0, 4)))]
    costs = CostModel.build(
        p,
        v,
        student_forward=draw(st.lists(duration, min_size=p * v, max_size=p * v)),
        student_backward=draw(st.lists(duration, min_size=p * v, max_size=p * v)),
        teacher_forward={name: draw(st.lists(duration, min_size=p, max_size=p)) for name in names},
        teacher_load={name: draw(duration) for name in names},
        head_load={name: draw(duration) for name in names},
        message=draw(st.sampled_from([0.0, 0.1])),
        optimizer=draw(st.sampled_from([0.0, 1.0])),
    )
    groups = []
    for name in names:
        members = tuple(sorted(draw(st.sets(st.integers(0, m - 1)))))
        last_uses = tuple(min(m - 1, i + draw(st.integers(0, 2))) for i in members)
        group = ScoringTask(name, members, 0, draw(st.integers(0, len(members))), last_uses)
        if draw(st.booleans()):  # some forwards keep log-probs, and some losses read no head
            scoring = tuple(i for i in members if draw(st.booleans()))
            losses = tuple(i for i in group.needed_by() if draw(st.booleans()))
            group = replace(group, scoring_heads=scoring, loss_heads=losses)
        groups.append(group)
        groups.append(ScoringTask(name, tuple(range(draw(st.integers(0, m)))), 1))
    activations = draw(st.sampled_from([None, v, v + 1, v + 3]))
    limits = Limits(activations, draw(st.integers(1, 3)))
    request = PlanRequest(p, m, costs, v, tuple(groups), draw(st.sampled_from(KINDS)), limits)
    if draw(st.booleans()):
        cache = request.smallest_cache() + draw(st.integers(0, 5))
        request = PlanRequest(
            p, m, costs, v, tuple(groups), request.kind, Limits(activations, 2, None, cache)
        )
    return request


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(requests())
def test_random_requests_complete_within_their_limits(request):
    """A plan finishes without deadlock, respects every limit, and takes at least the busiest stage's work."""
    plan = make_plan(request, effort=2_000)
    check_plan(plan)
    result = simulate(plan)
    limits = request.limits
    assert max(result.peak_activations) <= request.activation_limit()
    if limits.cached_states is not None:
        assert max(result.peak_cached_states) <= limits.cached_states
    ran = [sum(isinstance(entry, TeacherForward) for entry in entries) for entries in plan.stages]
    assert set(ran) == {len(request.pending_jobs()) - len(plan.deferred)}
    if not plan.deferred:
        assert result.total >= bubble_free_time(request) * (1 - 1e-9)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(requests())
def test_look_ahead_leaves_the_room_that_the_next_step_needs(request):
    """A step that fits the cache by itself still fits after the previous plan has scored ahead."""
    cold = tuple(replace(group, step=0) for group in request.scoring if group.step == 1)
    budget = replace(request, scoring=cold).smallest_cache()
    budget = max(budget, request.smallest_cache(), 1)
    plan = make_plan(replace(request, limits=replace(request.limits, cached_states=budget)), effort=2_000)
    following = replace(plan.request, scoring=plan.next_scoring(), resident=(), resident_heads=())
    check_plan(make_plan(following, effort=2_000))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(requests())
def test_random_plans_can_follow_one_another(request):
    """The next request inherits this plan's scored states, deferred jobs and occupied slots."""
    first = make_plan(request, effort=2_000)
    groups = tuple(ScoringTask(g.teacher, g.microbatches, g.step, g.scored) for g in first.next_scoring())
    follow = PlanRequest(
        request.stages,
        request.microbatches,
        request.costs,
        request.virtual_stages,
        groups,
        "bubble_fill",
        Limits(request.limits.activations, request.limits.resident_teachers),
        first.resident,
        first.resident_heads[:2],
    )
    second = make_plan(follow, effort=2_000)
    check_plan(second)
    assert len(simulate([first, second]).optimizer_steps) == 2
