"""The runtime on real ranks: gradients equal those of megatron-core's schedules, and errors are reported."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings

from megatron_mopd.backend.parallel import validate_layout
from megatron_mopd.config import ConfigError
from megatron_mopd.pipeline.communicator import (
    PipelineCommunicator,
    StageTimeout,
    all_channels,
    channel_kind,
)
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.instructions import Channel, OptimizerStep, Receive, StudentForward
from megatron_mopd.pipeline.plan import make_plan
from megatron_mopd.pipeline.problem import PlanRequest, split_scoring
from megatron_mopd.pipeline.runtime import Execution, Stopwatch
from megatron_mopd.pipeline.simulate import PlanError
from megatron_mopd.training import step as training_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool, run_ranks
from tests._megatron_schedules import MegatronSchedules
from tests.pipeline import small_work
from tests.pipeline.test_simulate import requests

DENSE, MOE = _models.DENSE, _models.MOE
DEEP = DENSE | dict(num_layers=8)
WIDE = DENSE | dict(hidden_size=48)
AUX = MOE | dict(moe_aux_loss_coeff=0.5, moe_router_load_balancing_type="aux_loss")
PACKED = dict(max_tokens_per_micro_batch=24, micro_batch_size=1)


def pp(p, v=None, **others):
    return dict(pipeline_model_parallel_size=p, virtual_pipeline_model_parallel_size=v) | others


TP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
EP = dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1)
OVERLAP = dict(optimizer=dict(overlap_grad_reduce=True))
TIED = dict(model=dict(share_embeddings_and_output_weights=True))
RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)

# (ranks, model, layout, trajectories of consecutive steps for each run, kinds, more sections)
CASES = {
    "p1": (1, DENSE, {}, [(1, 3), (4, 4)], ["bubble_fill", "back_to_back", "serial"], {}),
    "p2": (2, DENSE, pp(2), [(1, 1), (2, 3), (6, 5)], ["bubble_fill", "serial"], {}),
    "p2 tied, recompute": (2, DENSE | RECOMPUTE, pp(2), [(4, 4)], ["bubble_fill"], TIED),
    "p2 packed": (2, DENSE, pp(2), [(8, 8)], ["bubble_fill"], dict(schedule=PACKED)),
    "p2 v2": (2, DENSE, pp(2, 2), [(1, 2), (4, 3), (6, 6)], ["bubble_fill", "back_to_back"], {}),
    "p2 no teachers": (2, DENSE, pp(2), [(3, 2)], ["bubble_fill"], dict(kind="sft")),
    "p2 wider teachers": (2, DENSE, pp(2), [(3, 4)], ["bubble_fill"], dict(teacher_transformer=WIDE)),
    "p4": (4, DEEP, pp(4), [(1, 4), (7, 3), (12, 12)], ["bubble_fill", "back_to_back"], {}),
    "p4 v2": (4, DEEP, pp(4, 2), [(4, 4), (6, 8)], ["bubble_fill", "serial"], {}),
    "p2 tp2": (4, AUX, pp(2, **TP), [(4, 4)], ["bubble_fill"], {}),
    "p2 ep2": (4, AUX, pp(2, **EP), [(8, 6)], ["bubble_fill"], OVERLAP),
    "p2 v2 dp2": (4, AUX, pp(2, 2), [(8, 10)], ["bubble_fill"], OVERLAP),
    "p2 cp2": (4, DENSE, pp(2, context_parallel_size=2), [(3, 5)], ["bubble_fill"], {}),
}


def gradients(learner, batches, kind):
    """The loss reports and the reduced gradients of one step, without changing the weights."""
    for chunk in learner.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    pipeline = MegatronSchedules(learner.groups) if kind == "megatron" else learner.pipeline
    execution = pipeline.start(
        learner.chunks, batches, training_step.build_loss(learner, batches[0]), learner.bank
    )
    execution.run_to_update()
    pipeline.plan_next()
    execution.run_rest()
    reported = [{name: value.clone() for name, value in report.items()} for report in execution.work.reports]
    return reported, [p.main_grad.clone() for c in learner.chunks for p in c.parameters()]


def planned(learner, counts):
    """Batches of consecutive steps, with `counts` trajectories each. With virtual stages all have one length,
    as megatron-core's interleaved schedule needs; with different lengths `training/test_parallel_invariance`
    compares them with one rank."""
    is_interleaved = learner.groups.vpp_size > 1
    return deque(
        plan_step(learner, _models.batch(count, 10 * number + count, equal_lengths=is_interleaved))
        for number, count in enumerate(counts)
    )


def forward_alone(rank, parallel, count):
    """Last hidden states of every micro-batch from our executor and from megatron-core's schedule, between
    two training steps that look ahead."""
    learner = _models.make_learner(DENSE, parallel, schedule=dict(micro_batch_size=1), params_dtype="float32")
    batches = planned(learner, (4, count))
    gradients(learner, batches, "bubble_fill")
    batch, found = batches[1], []
    for pipeline in (learner.pipeline, MegatronSchedules(learner.groups)):
        states = []
        pipeline.forward(
            learner.chunks,
            batch.student,
            lambda micro_batch, hidden, states=states: states.append(hidden.clone()),
        )
        found.append(states[: len(batch.student)])
    batches.popleft()
    gradients(learner, batches, "bubble_fill")
    return found


@pytest.mark.parametrize(
    "ranks, parallel, count",
    [(1, {}, 3), (2, pp(2), 5), (2, pp(2, 2), 3), (4, pp(4), 2)],
    ids=["p1", "p2", "p2 v2", "p4"],
)
def test_forward_passes_alone_equal_megatron_cores(pools, ranks, parallel, count):
    *others, (ours, theirs) = pools[ranks].run(forward_alone, parallel, count)
    assert all(own == [] == reference for own, reference in others), "not only the last stage has states"
    assert len(ours) == len(theirs) > 1
    for mine, expected in zip(ours, theirs):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)
        assert mine.abs().max() > 0


def compare(rank, transformer, parallel, step_counts, kinds, sections):
    sections = dict(sections)
    schedule = dict(micro_batch_size=1) | sections.pop("schedule", {})
    learner = _models.make_learner(
        transformer, parallel, schedule=schedule, params_dtype="float32", **sections
    )
    config = _models.unwrap(learner.chunks[0]).config
    if config.num_moe_experts:
        # Teachers do not have this scale, so a teacher that set the auxiliary loss's scale would be noticed.
        config.grad_scale_func = lambda loss: 3 * loss
    lengths = []
    for counts in step_counts:
        expected = [gradients(learner, [b], "megatron") for b in planned(learner, counts)]
        for kind in kinds:
            learner.pipeline.kind = kind
            batches = planned(learner, counts)
            lengths.append(len(batches[0].student))
            for reports, grads in expected:
                found, found_grads = gradients(learner, batches, kind)
                assert len(batches.popleft().cache) == 0, "a cached state was not used"
                # The interleaved reference has empty micro-batches at the end.
                for mine, theirs in zip(found, reports, strict=len(found) == len(reports)):
                    for name, value in theirs.items():
                        torch.testing.assert_close(mine[name], value, rtol=0, atol=0, msg=name)
                for mine, theirs in zip(found_grads, grads, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
                assert any(g.abs().max() > 0 for g in found_grads)
    return lengths


@pytest.fixture(scope="module")
def pools():
    with RankPool(1, 300) as one, RankPool(2, 300) as two, RankPool(4, 300) as four:
        yield {1: one, 2: two, 4: four}


@pytest.fixture(scope="module")
def four_ranks():
    """Ranks whose groups live as long as the pool, because no model is built on them."""
    with RankPool(4, 300) as four:
        yield four


@pytest.mark.parametrize("case", CASES)
def test_bit_equal_to_megatron_cores_schedules(pools, case):
    """Two steps, the second scored ahead: the reports of every micro-batch and every gradient are bitwise
    equal in float32.
    """
    ranks, *arguments = CASES[case]
    pools[ranks].run(compare, *arguments)


@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@given(request=requests(stages=(1, 2, 4)))
def test_random_plans_run_for_real(four_ranks, request):
    """Random stages, chunks, micro-batches, teacher groups and limits on gloo, against plain autograd."""
    results = four_ranks.run(small_work.run_request, request)
    expected = small_work.reference(request)
    for rank, (grads, _) in enumerate(results):
        stage = rank % request.stages
        for chunk, gradient in enumerate(grads):
            torch.testing.assert_close(
                gradient, expected[chunk * request.stages + stage], rtol=1e-10, atol=1e-12
            )


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 8])
def test_every_rank_uses_a_communicator_in_one_direction_with_one_peer(stages):
    """So that on NCCL an early receive cannot hold back a send."""
    used: dict[tuple[int, int], Channel] = {}
    for channel in all_channels(stages, 2):
        for stage in (channel.source, channel.destination):
            assert used.setdefault((stage, channel_kind(channel)), channel) == channel
    needed = {
        e.channel
        for entries in make_plan(
            PlanRequest(
                stages, 4, CostModel.build(stages, 2, teacher_forward={"t": 1.0}), 2, split_scoring({"t": 4})
            )
        ).stages
        for e in entries
        if isinstance(e, Receive)
    }
    assert needed == set(all_channels(stages, 2))


def first_messages(rank, stages):
    """The channels that have carried a message after construction, and how many."""
    channels = PipelineCommunicator(
        small_work.pipeline_group(stages),
        torch.device("cpu"),
        virtual_stages=2,
        timeout=timedelta(seconds=30),
    )
    return rank % stages, dict(channels._numbers)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_every_channel_is_connected_before_the_first_plan(four_ranks, stages):
    """With NCCL the first message of two ranks blocks both hosts, in a plan perhaps in a circle."""
    for stage, counts in four_ranks.run(first_messages, stages):
        mine = {c: 1 for c in all_channels(stages, 2) if stage in (c.source, c.destination)}
        assert counts == mine


# --- errors -----------------------------------------------------------------------------------------------


def broken_step(rank, what):
    """Run one step with a plan that is broken on rank 1 or on all ranks; returns this rank's error."""
    learner = _models.make_learner(DENSE, pp(2), schedule=dict(micro_batch_size=1))
    driver, batches = learner.pipeline, planned(learner, (3, 3))
    make = driver._planner.plan

    def sabotage(request):
        plan = make(request)
        entries = list(plan.stages[1])
        if what == "missing receive":
            entries.remove(next(e for e in entries if isinstance(e, Receive)))
        elif what == "unequal counts" and rank == 1:
            entries.remove(next(e for e in entries if isinstance(e, StudentForward)))
        elif what == "other plan" and rank == 1:
            request = dataclasses.replace(request, kind="back_to_back")
            return make_plan(request)
        return dataclasses.replace(plan, stages=(plan.stages[0], tuple(entries)), _digest=[])

    driver._planner.plan = sabotage
    started = time.monotonic()
    try:
        gradients(learner, batches, "bubble_fill")
    except (PlanError, ValueError) as error:
        return str(error), time.monotonic() - started
    return "", 0.0


@pytest.mark.parametrize(
    "what, expected",
    [
        ("missing receive", "has no receive at stage 1"),
        ("unequal counts", "rank 1: the plan cannot be executed"),
        ("other plan", "ranks [1] hold a different plan"),
    ],
)
def test_a_broken_plan_is_rejected_on_every_rank_before_the_step(pools, what, expected):
    for text, seconds in pools[2].run(broken_step, what):
        assert expected in text or "a different plan" in text, text
        assert seconds < 30


def limits_error(rank, schedule):
    learner = _models.make_learner(DENSE, pp(2, 2), schedule=dict(micro_batch_size=1) | schedule)
    try:
        gradients(learner, planned(learner, (4,)), "bubble_fill")
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "schedule, message",
    [
        (dict(max_activations=1), "limit activations=1 cannot be met by any plan: the smallest value that"),
        (dict(max_cached_states=0), "limit cached_states=0 cannot be met by any plan: the smallest value"),
    ],
)
def test_limits_that_no_plan_meets(pools, schedule, message):
    assert all(message in text for text in pools[2].run(limits_error, schedule))


def layout_error(rank, parallel, layers):
    config = _models.config_from_dict({"run_dir": "unused", "parallel": parallel})
    try:
        size = dist.get_world_size()
        validate_layout(config.parallel, size, num_layers=layers, num_moe_experts=None, num_attention_heads=4)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    "parallel, layers, message",
    [
        (pp(2), 1, "2 stages x 1 virtual chunks do not divide num_layers=1; valid products: 1"),
        (pp(2, 3), 4, "2 stages x 3 virtual chunks do not divide num_layers=4; valid products: 1, 2, 4"),
    ],
)
def test_stages_and_chunks_that_do_not_divide_the_layers(pools, parallel, layers, message):
    assert all(message in text for text in pools[2].run(layout_error, parallel, layers))


def wait_for_the_dead(rank):
    """Rank 1 never starts its instructions; returns the error of rank 0."""
    request = PlanRequest(
        2, 2, CostModel.build(2, teacher_forward={"t0": 1.0}), scoring=split_scoring({"t0": 2})
    )
    group = small_work.pipeline_group(2)
    channels = PipelineCommunicator(group, torch.device("cpu"), timeout=timedelta(seconds=1))
    if rank == 1:
        time.sleep(2)
        return None
    work = small_work.SmallWork(request, 0)
    try:
        instructions, stopwatch = make_plan(request).stages[0], Stopwatch(torch.device("cpu"))
        Execution(instructions, 0, work, channels, stopwatch).run_to_update()
    except StageTimeout as error:
        return "\n".join([str(error), *error.__notes__])


def test_a_rank_that_stops_answering_is_named():
    text = run_ranks(2, wait_for_the_dead)[0]
    assert "no message from stage 1 (rank 1) on student_backward 1->0 within 1 s" in text
    assert "on pipeline stage 0, at instruction" in text and "student backward micro-batch 0" in text


def measured(rank):
    """Recorded timelines of three steps, the driver's costs, and what the pipeline reports."""
    learner = _models.make_learner(DENSE, pp(2), schedule=dict(micro_batch_size=1))
    batches = planned(learner, (4, 4, 4))
    agreements, plan = 0, learner.pipeline.agree_on_plan

    def counted(*arguments):
        nonlocal agreements
        agreements += 1
        return plan(*arguments)

    learner.pipeline.agree_on_plan = counted
    for _ in range(3):
        training_step.train_step(learner, batches)
        batches.popleft()
    driver = learner.pipeline
    assert agreements == 3, "a step was not planned exactly once"
    driver._exchange_costs()
    return driver.timelines(2), driver.idle_shares, driver._costs.model()


def test_timelines_are_measured_on_every_rank_and_costs_follow(pools):
    (timelines, shares, costs), (_, other_shares, other_costs) = pools[2].run(measured)
    assert costs == other_costs and shares == other_shares
    assert all(0 < cost < 30 for cost in (*costs.student_forward, *costs.student_backward))
    for title, events in timelines.items():
        assert {event.stage for event in events} == {0, 1}, title
        assert (
            sum(isinstance(event.instruction, OptimizerStep) for event in events) == 4 or "planned" in title
        )
        assert all(event.end >= event.start >= 0 for event in events)
    assert len(shares) == 2 and all(0 <= share < 1 for share in shares)
