"""The planner: the requests that it refuses, the contents of its plans, and the detection of broken plans."""

from dataclasses import replace

import pytest

from megatron_mopd.pipeline.check import check_plan, check_same_plan, find_problems
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.instructions import (
    Lane,
    LoadHead,
    LoadTeacher,
    OptimizerStep,
    Receive,
    Send,
    StudentBackward,
    StudentForward,
    Synchronize,
    TeacherForward,
)
from megatron_mopd.pipeline.measured_costs import MeasuredCosts, summarize
from megatron_mopd.pipeline.plan import Planner, bubble_free_time, lower_bound, make_plan
from megatron_mopd.pipeline.problem import Limits, PlanRequest, ScoringTask, split_scoring
from megatron_mopd.pipeline.simulate import PlanError, simulate


def request(
    stages=4,
    microbatches=8,
    counts=None,
    *,
    virtual_stages=1,
    own=True,
    ahead=True,
    kind="bubble_fill",
    limits=None,
):
    counts = (
        {"math": microbatches // 2, "code": microbatches - microbatches // 2} if counts is None else counts
    )
    scoring = split_scoring(counts, scored=not own)
    if ahead:
        scoring += split_scoring(counts, step=1)
    costs = CostModel.build(stages, virtual_stages, teacher_forward=dict.fromkeys(counts, 1.0))
    return PlanRequest(
        stages, microbatches, costs, virtual_stages, scoring, kind=kind, limits=limits or Limits()
    )


def with_sizes(asked, size):
    """The request with micro-batches of size(number), the student's and the teachers' alike."""
    return replace(
        asked,
        sizes=tuple(map(size, range(asked.microbatches))),
        scoring=tuple(replace(g, sizes=tuple(map(size, g.microbatches))) for g in asked.scoring),
    )


def of_type(plan, stage, kind):
    return [entry for entry in plan.stages[stage] if isinstance(entry, kind)]


@pytest.mark.parametrize("kind", ["bubble_fill", "back_to_back", "serial"])
@pytest.mark.parametrize("virtual_stages", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_every_stage_computes_everything_once(stages, virtual_stages, kind):
    plan = make_plan(request(stages, 6, virtual_stages=virtual_stages, kind=kind))
    check_plan(plan)
    for stage in range(stages):
        assert len(of_type(plan, stage, StudentForward)) == 6 * virtual_stages
        assert len(of_type(plan, stage, StudentBackward)) == 6 * virtual_stages
        assert len(of_type(plan, stage, TeacherForward)) == 12
        assert len(of_type(plan, stage, OptimizerStep)) == 1
        assert bool(of_type(plan, stage, Synchronize)) == (kind == "serial")


def test_student_order_is_the_same_for_every_kind():
    """Gradients accumulate in the same order in every schedule, so results can be compared bit by bit."""
    plans = [make_plan(request(kind=kind)) for kind in ("bubble_fill", "back_to_back", "serial")]
    for stage in range(4):
        assert len({tuple(of_type(plan, stage, StudentBackward)) for plan in plans}) == 1


def test_each_teacher_is_loaded_once_and_into_a_free_slot():
    """The first one is loaded again at the end, because the next step begins with it."""
    plan = make_plan(request(counts={"a": 3, "b": 2, "c": 3}, ahead=False))
    for stage in range(4):
        assert [(e.teacher, e.slot) for e in of_type(plan, stage, LoadTeacher)] == [
            ("a", 0),
            ("b", 1),
            ("c", 0),
            ("a", 1),
        ]
    assert [e.teacher for e in of_type(plan, 3, LoadHead)] == ["a", "b", "c"]
    assert not of_type(plan, 0, LoadHead)
    assert plan.resident == ("c", "a")


@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("teachers", [3, 12])
def test_only_the_first_load_of_a_run_is_waited_for(stages, teachers):
    """Every other load begins while the previous teacher still scores, also at the start of a step and also
    when teachers are still resident from the previous step: keeping one of them would leave a single slot for
    the rest. A load takes nine tenths of the time of scoring.
    """
    counts = {f"t{number:02d}": 2 for number in range(teachers)}
    base = request(stages, 2 * teachers, counts, ahead=False, kind="back_to_back")
    costs = CostModel.build(
        stages, teacher_forward=dict.fromkeys(counts, 1.0), teacher_load=dict.fromkeys(counts, 1.8)
    )
    plans, slots = [], {}
    for _ in range(3):
        plans.append(make_plan(replace(base, costs=costs, **slots)))
        check_plan(plans[-1])
        slots = {"resident": plans[-1].resident, "resident_heads": plans[-1].resident_heads}
    free = [replace(plan, request=replace(plan.request, costs=base.costs)) for plan in plans]
    assert simulate(plans).total == pytest.approx(1.8 + simulate(free).total)


def test_a_resident_teacher_goes_first_and_is_not_loaded_again():
    first = make_plan(request(counts={"a": 4, "b": 4}))
    again = replace(
        first.request,
        scoring=first.next_scoring() + split_scoring({"a": 4, "b": 4}, step=1),
        resident=first.resident,
        resident_heads=first.resident_heads,
    )
    plan = make_plan(again)
    check_plan(plan)
    assert not of_type(plan, 0, LoadTeacher)


def test_look_ahead_that_does_not_fit_is_deferred_and_taken_up_again():
    plan = make_plan(request(limits=Limits(cached_states=5)))
    check_plan(plan)
    assert len(plan.deferred) == 3 and all(job.step == 1 for job in plan.deferred)
    scoring = plan.next_scoring()
    assert sum(task.scored for task in scoring) == 5 and {task.step for task in scoring} == {0}
    follow = make_plan(replace(plan.request, scoring=scoring))
    check_plan(follow)
    assert len(of_type(follow, 0, TeacherForward)) == 3


def test_a_micro_batch_with_three_teachers_gets_three_heads():
    scoring = tuple(ScoringTask(name, (0, 1, 2)) for name in "abc")
    costs = CostModel.build(2, teacher_forward=dict.fromkeys("abc", 1.0))
    plan = make_plan(PlanRequest(2, 3, costs, scoring=scoring))
    check_plan(plan)
    assert simulate(plan).peak_cached_states[1] >= 7  # a and b score all three, then c the first


def scoring_request(kind, stages=4):
    """Three teachers whose forwards keep log-probs of sampled tokens: no loss reads a head."""
    plain = request(stages, counts={"a": 3, "b": 2, "c": 3}, ahead=False, kind=kind)
    scoring = tuple(replace(g, scoring_heads=g.microbatches, loss_heads=()) for g in plain.scoring)
    return replace(plain, scoring=scoring)


@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("kind", ["bubble_fill", "back_to_back", "serial"])
def test_a_head_that_scoring_reads_is_loaded_while_the_teacher_before_scores(kind, stages):
    """The first one is loaded again at the end, because the next step begins with it; losses load none."""
    plan = make_plan(scoring_request(kind, stages))
    check_plan(plan)
    entries = plan.stages[-1]
    assert [e.teacher for e in entries if isinstance(e, LoadHead)] == ["a", "b", "c", "a"]
    assert plan.resident_heads == ("c", "a")
    order = [
        e.teacher if isinstance(e, LoadHead) else e.job.teacher.upper()
        for e in entries
        if isinstance(e, LoadHead | TeacherForward)
    ]
    assert order == [*"abAAA", *"cBB", *"aCCC"]
    again = make_plan(replace(plan.request, resident=plan.resident, resident_heads=plan.resident_heads))
    assert [e.teacher for e in of_type(again, stages - 1, LoadHead)] == ["b", "c", "a"]
    with pytest.raises(PlanError, match="teacher forward b .*head of teacher b is not loaded"):
        check_plan(without(plan, stages - 1, lambda e: isinstance(e, LoadHead) and e.teacher == "b"))


def test_forwards_wait_for_their_heads_in_the_simulation():
    plain = scoring_request("back_to_back")
    costs = replace(plain.costs, head_load=(("a", 100.0),))
    assert simulate(make_plan(replace(plain, costs=costs))).total >= 100
    without_heads = tuple(replace(g, scoring_heads=()) for g in plain.scoring)
    assert simulate(make_plan(replace(plain, costs=costs, scoring=without_heads))).total < 100


def test_heads_of_losses_and_of_forwards_share_their_slots():
    """One teacher has both kinds of objective, and one micro-batch's loss reads two of three heads."""
    scoring = (
        ScoringTask("a", (0, 1, 2), scoring_heads=(1,), loss_heads=(0, 2)),
        ScoringTask("b", (0, 1, 2), loss_heads=(2,)),
        ScoringTask("c", (0, 1, 2), scoring_heads=(0, 1, 2), loss_heads=()),
    )
    costs = CostModel.build(2, teacher_forward=dict.fromkeys("abc", 1.0))
    planned = PlanRequest(2, 3, costs, scoring=scoring)
    assert planned.heads_needed() == (("a",), (), ("a", "b")) and planned.head_slots() == 2
    check_plan(make_plan(planned))
    with pytest.raises(ValueError, match=r"scoring_heads=\(3,\) is not among \(0, 1, 2\)"):
        ScoringTask("a", (0, 1, 2), scoring_heads=(3,))


@pytest.mark.parametrize("counts", [{}, {"empty": 0, "all": 5}])
def test_no_teachers_and_empty_groups(counts):
    check_plan(make_plan(request(3, 5, counts)))


def test_plans_are_cached_and_deterministic():
    planner = Planner()
    one = planner.plan(request())
    assert planner.plan(request()) is one
    assert Planner().plan(request()).digest() == one.digest()
    other = make_plan(request(counts={"math": 3, "code": 5}))
    check_same_plan(dict.fromkeys(range(4), one.digest()))
    with pytest.raises(PlanError, match=r"ranks \[2\] hold a different plan"):
        check_same_plan(dict(enumerate([one.digest(), one.digest(), other.digest(), one.digest()])))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(activations=1), "activations=1 .*smallest value that works is 2"),
        (Limits(resident_teachers=0), "resident_teachers=0 .*smallest value that works is 1"),
        (Limits(resident_heads=0), "resident_heads=0 .*smallest value that works is 1"),
        (Limits(cached_states=0), "cached_states=0 .*smallest value that works is 1"),
    ],
)
def test_impossible_limits_name_the_smallest_that_works(limits, message):
    bad = request(virtual_stages=2, limits=limits)
    with pytest.raises(ValueError, match=message):
        make_plan(bad)
    name = next(name for name, value in vars(limits).items() if value in (0, 1))
    smallest = int(message.rsplit(" ", 1)[1])
    check_plan(make_plan(replace(bad, limits=replace(Limits(), **{name: smallest}))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "zigzag"}, "'zigzag' is not one of bubble_fill"),
        ({"stages": 0}, "stages=0"),
        ({"stages": 5}, "student_forward has 4 entries, expected 5"),
        ({"scoring": (ScoringTask("poetry", (0,)),)}, "no teacher_forward for teacher 'poetry'"),
        ({"scoring": (ScoringTask("math", (8,)),)}, "8 \\(numbered from 0\\)"),
        ({"scoring": (ScoringTask("math", (0,)), ScoringTask("math", (1,)))}, "two scoring tasks for step 0"),
        ({"resident": ("a", "b", "c")}, "lists 3 teachers, but there are 2 slots"),
    ],
)
def test_bad_requests(change, message):
    with pytest.raises(ValueError, match=message):
        make_plan(replace(request(), **change))


# --- broken plans -------------------------------------------------------------------------------------


def without(plan, stage, chosen):
    entries = tuple(entry for entry in plan.stages[stage] if not chosen(entry))
    assert len(entries) < len(plan.stages[stage])
    return replace(plan, stages=plan.stages[:stage] + (entries,) + plan.stages[stage + 1 :])


def swapped(plan, stage, first, second):
    entries = list(plan.stages[stage])
    i, j = entries.index(first), entries.index(second)
    entries[i], entries[j] = entries[j], entries[i]
    return replace(plan, stages=plan.stages[:stage] + (tuple(entries),) + plan.stages[stage + 1 :])


def test_a_missing_receive_is_named():
    target = StudentForward(3)
    broken = without(make_plan(request()), 2, lambda e: isinstance(e, Receive) and e.consumer == target)
    with pytest.raises(PlanError) as caught:
        check_plan(broken)
    text = str(caught.value)
    assert "stage 2" in text and "student forward micro-batch 3" in text and "no receive from stage 1" in text
    assert "has no receive at stage 2, which receives 7 of 8 messages" in text or "message 3" in text


def test_a_missing_send_is_named():
    target = StudentBackward(5)
    broken = without(make_plan(request()), 2, lambda e: isinstance(e, Send) and e.consumer == target)
    with pytest.raises(PlanError, match="stage 2, instruction .*no send to stage 1 follows it"):
        check_plan(broken)


def test_unequal_counts_are_named():
    broken = without(make_plan(request()), 1, lambda e: e == StudentForward(7))
    with pytest.raises(
        PlanError, match=r"stage 1 never runs \(student forward micro-batch 7 chunk 0\), and stage 2"
    ):
        check_plan(broken)


def test_messages_out_of_order_are_named():
    plan = make_plan(request(kind="back_to_back"))
    sends = [e for e in of_type(plan, 0, Send) if e.channel.lane is Lane.TEACHER_FORWARD]
    with pytest.raises(PlanError, match="teacher_forward 0->1: message 0 is .* at stage 0, instruction"):
        check_plan(swapped(plan, 0, sends[0], sends[1]))


def test_a_circle_of_waits_is_found_although_every_message_has_both_ends():
    plan = make_plan(request(2, 1, {}, kind="back_to_back"))
    # Stage 0 waits for the first gradient before it sends the activation from which it is computed.
    send = next(e for e in plan.stages[0] if isinstance(e, Send))
    entries = [e for e in plan.stages[0] if e != send]
    entries.insert(entries.index(StudentBackward(0)) + 1, send)
    broken = replace(plan, stages=(tuple(entries), plan.stages[1]))
    assert not find_problems(broken)
    with pytest.raises(PlanError, match="stage 0, instruction .*waits for message 0 from stage 1") as caught:
        check_plan(broken)
    assert "stage 1, instruction" in str(caught.value)


def test_a_teacher_that_is_not_loaded_and_a_loss_before_its_teacher():
    plan = make_plan(request())
    with pytest.raises(PlanError, match="teacher math is not loaded"):
        check_plan(without(plan, 1, lambda e: isinstance(e, LoadTeacher) and e.teacher == "math"))
    with pytest.raises(PlanError, match="head of teacher code is not loaded"):
        check_plan(without(plan, 3, lambda e: isinstance(e, LoadHead) and e.teacher == "code"))
    early = swapped(plan, 3, of_type(plan, 3, TeacherForward)[0], StudentForward(0))
    with pytest.raises(PlanError, match="teacher math has not scored this micro-batch yet"):
        check_plan(early)


def test_a_missing_optimizer_step_and_an_exceeded_limit():
    plan = make_plan(request())
    with pytest.raises(PlanError, match="stage 3 has 0 optimizer steps"):
        check_plan(without(plan, 3, lambda e: isinstance(e, OptimizerStep)))
    narrow = replace(plan, request=replace(plan.request, limits=Limits(activations=2)))
    with pytest.raises(PlanError, match="stage 0, .*3 activations in flight, the limit is 2"):
        check_plan(narrow)


# --- measured costs -----------------------------------------------------------------------------------


def test_measured_costs_follow_the_run_but_ignore_noise():
    guess = request().costs
    measured = MeasuredCosts(guess, 4)
    real = replace(guess, student_forward=(1.0, 1.0, 1.0, 1.6))
    sized = with_sizes(replace(request(), costs=real), lambda number: 1 + number % 3)
    events = simulate(make_plan(sized), record=True).events
    per_rank = [summarize((e for e in events if e.stage == stage), sized) for stage in range(4)]
    measured.fold(per_rank)
    model = measured.model()
    assert model.student_forward == pytest.approx(real.student_forward)
    assert model.student_backward == pytest.approx(guess.student_backward)
    assert dict(model.teacher_forward)["math"] == pytest.approx((1.0,) * 4)
    measured.fold([[mean._replace(seconds=mean.seconds * 1.05) for mean in rank] for rank in per_rank])
    assert measured.model() is model  # a change of 1% after averaging does not justify a new plan


@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_costs_are_per_unit_of_size(virtual_stages):
    """Micro-batches of twice the size at half the costs give the same plan and take the same time."""
    asked = request(virtual_stages=virtual_stages)
    costs = asked.costs
    halved = replace(
        costs,
        student_forward=tuple(cost / 2 for cost in costs.student_forward),
        student_backward=tuple(cost / 2 for cost in costs.student_backward),
        teacher_forward=tuple((t, tuple(c / 2 for c in row)) for t, row in costs.teacher_forward),
    )
    doubled = with_sizes(replace(asked, costs=halved), lambda _: 2)
    plan, same = make_plan(asked), make_plan(doubled)
    assert same.digest() == plan.digest()
    assert simulate(same).total == pytest.approx(simulate(plan).total)
    assert lower_bound(doubled) == pytest.approx(lower_bound(asked))


@pytest.mark.parametrize(
    "sizes",
    [[15 + number % 2 for number in range(32)], [14, 14, 14, 14, 14, 14, 14, 9] * 4],
    ids=["levelled", "with shorter last pieces"],
)
def test_micro_batches_of_different_sizes_leave_few_bubbles(sizes):
    """Eight stages and 32 micro-batches of sizes as `data.division` makes them: in a steady state close to
    the busiest stage's work, which no plan can beat."""
    asked = with_sizes(request(8, 32), sizes.__getitem__)
    ahead = tuple(g for g in asked.scoring if g.step)
    plans = [make_plan(asked)]
    for _ in range(4):
        last = plans[-1]
        check_plan(last)
        later = replace(
            asked,
            scoring=last.next_scoring() + ahead,
            resident=last.resident,
            resident_heads=last.resident_heads,
        )
        plans.append(make_plan(later))
    ends = simulate(plans).optimizer_steps
    assert (ends[-1] - ends[-2]) / bubble_free_time(later) < 1.05


def test_sizes_must_match():
    with pytest.raises(ValueError, match="student: 2 sizes for 8 micro-batches"):
        make_plan(replace(request(), sizes=(1, 2)))
    with pytest.raises(ValueError, match="'math': sizes must be above 0"):
        ScoringTask("math", (0, 1), sizes=(3, 0))


def test_lower_bound_is_the_students_fill_and_drain_when_teachers_are_cheap():
    cheap = PlanRequest(
        8, 32, CostModel.build(8, teacher_forward={"t": 0.3}), scoring=split_scoring({"t": 32})
    )
    assert lower_bound(cheap) == pytest.approx((32 + 7) * 3)
