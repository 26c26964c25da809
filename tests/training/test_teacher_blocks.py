"""The size of teacher blocks, what a block sees of a batch, and blocks that differ in what they run."""

from __future__ import annotations

import pytest
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.backend.blocks import Block
from megatron_mopd.config import ConfigError, config_from_dict
from megatron_mopd.teachers.bank import TeacherSource
from megatron_mopd.teachers.layout import DENSE as DENSE_SEGMENT
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from megatron_mopd.training.teacher_blocks import block_notes, with_block_size
from tests import _models
from tests._distributed import RankPool

EP2 = dict(expert_model_parallel_size=2)
PP2 = dict(pipeline_model_parallel_size=2)
UNEVEN = ["t0", "t1", "t1"]
"""With a teacher for t0 alone, its samples are less than half of the work: one of two blocks has none."""
TEACHERS = {f"t{number}": 20 + number for number in range(12)}


def size_of(parallel, transformer=_models.DENSE, world_size=16, ranks_per_host=None, **sections):
    config = config_from_dict({"run_dir": "unused", "parallel": parallel, **sections})
    student = _models.model_config(transformer)
    return with_block_size(config, student, world_size, ranks_per_host).teacher_block_size


def test_blocks_are_as_small_as_the_experts_allow():
    assert size_of({}) == 1
    assert size_of(PP2 | dict(expert_model_parallel_size=4), _models.MOE) == 4
    assert size_of(dict(teacher_block_size=8)) == 8


def test_sharded_teachers_have_the_ranks_of_a_host_as_a_block():
    sharded = dict(teacher_storage=dict(mode="host_sharded"))
    assert size_of({}, ranks_per_host=8, **sharded) == 8
    assert size_of({}, **sharded) == 16
    assert size_of(dict(tensor_model_parallel_size=2), ranks_per_host=8, **sharded) == 4
    # A pipeline stage of a host, and a data-parallel rank that spans two hosts.
    assert size_of(PP2 | dict(tensor_model_parallel_size=4), ranks_per_host=4, **sharded) == 1
    assert size_of(dict(tensor_model_parallel_size=8), ranks_per_host=4, **sharded) == 1
    assert size_of(dict(expert_model_parallel_size=8), _models.MOE, ranks_per_host=4, **sharded) == 8
    assert size_of(dict(teacher_block_size=2), ranks_per_host=8, **sharded) == 2


def test_a_loss_over_all_ranks_has_one_block():
    everywhere = _models.MOE | dict(moe_router_load_balancing_type=["seq_aux_loss", "global_aux_loss"])
    everywhere["moe_aux_loss_coeff"] = [0.1, 0.1]
    assert size_of(EP2, everywhere) == 16
    assert size_of(EP2 | dict(teacher_block_size=16), everywhere) == 16
    with pytest.raises(ConfigError, match="global_aux_loss sums over all 16 data-parallel ranks"):
        size_of(EP2 | dict(teacher_block_size=4), everywhere)


def test_domains_that_cannot_fill_a_block_are_named_with_their_cost():
    assert block_notes(Block(1, 1, 0), 12, {"math": 4.0}) == []
    (small,) = block_notes(Block(1, 8, 0), 12, {"math": 0.5 * 8, "code": 4.0})
    assert small == "teacher blocks: 8 of 1 data-parallel rank each, with at most 3 of 12 teachers in a step"
    blocks, domain = block_notes(Block(8, 2, 0), 3, {"math": 8.0, "rare": 2.0})
    assert blocks.startswith("teacher blocks: 2 of 8 data-parallel ranks each, with at most 3 of 3")
    assert domain.startswith("domain 'rare' has about 2.0 samples a step for the 8 ranks of a block")
    assert "compute 4.0 times as many tokens as needed" in domain


def of_domains(domains, each, seed=0):
    batch = _models.batch(len(domains) * each, seed=seed, equal_lengths=True)
    return [
        _models.trajectory(t.index, list(t.prompt.token_ids), list(t.response_ids), domains[t.index // each])
        for t in batch
    ]


def learner_of(names, parallel, **sections):
    frozen = _models.model_config(_models.DENSE | dict(num_layers=2))
    return _models.make_learner(
        _models.DENSE | dict(num_layers=2),
        parallel,
        sources=[TeacherSource(name, frozen, TEACHERS[name]) for name in names],
        routing={name: name for name in names},
        domains=sorted(names),
        **sections,
    )


def loads(rank, count, parallel):
    """In each of three steps: the teachers of this rank's block, and those whose layers are loaded."""
    names = list(TEACHERS)[:count]
    learner = learner_of(names, parallel, schedule=dict(micro_batch_size=2))
    begin, loaded, found = learner.bank.store.begin, [], []

    def counted(key, destination):
        if key[1] == DENSE_SEGMENT:
            loaded.append(key[0])
        return begin(key, destination)

    learner.bank.store.begin = counted
    for step in range(3):
        batch = plan_step(learner, of_domains(names, 4, seed=step))
        loaded.clear()
        train_step(learner, [batch])
        found.append((sorted(batch.teachers), sorted(loaded)))
    return found


@pytest.fixture(scope="module")
def pool():
    with RankPool(4, timeout=180) as ranks:
        yield ranks


def test_a_block_with_one_teacher_keeps_it_and_twelve_are_loaded_once_by_some_block(pool):
    kept = pool.run(loads, 4, {})
    for first, *later in kept:
        assert len(first[0]) == 1 and first[1] == first[0]
        assert later == [(first[0], [])] * 2, "a teacher that stays was loaded again"
    assert {name for first, *_ in kept for name in first[0]} == set(list(TEACHERS)[:4])

    of_twelve = pool.run(loads, 12, {})
    for step in range(3):
        seen = [found[step] for found in of_twelve]
        assert {name for teachers, _ in seen for name in teachers} == set(TEACHERS)
        assert all(len(teachers) <= 12 // 4 + 1 and len(loaded) <= 12 // 4 + 1 for teachers, loaded in seen)

    for found in pool.run(loads, 12, dict(teacher_block_size=4)):
        assert all(teachers == sorted(TEACHERS) for teachers, _ in found)


def with_and_without_teachers(rank, parallel):
    """Losses of four steps with look-ahead, and in how many of them this rank's block has a teacher."""
    learner = learner_of(
        ["t0", "t1"],
        parallel,
        objective=dict(per_domain={"t1": dict(kind="sft")}),
        schedule=dict(micro_batch_size=1),
    )
    # New samples arrive after every step, which change the plan of the blocks with teachers alone.
    batches, losses = [plan_step(learner, of_domains(UNEVEN, 4))], []
    scored = 0
    for step in range(4):
        batches.append(plan_step(learner, of_domains(UNEVEN, 4, seed=step)))
        losses.append(train_step(learner, batches)["loss"])
        scored += bool(batches.pop(0).teachers)
    return losses, scored


def test_blocks_with_and_without_teachers_start_their_steps_together(pool):
    (alone, _), *_ = pool.run(with_and_without_teachers, PP2 | dict(teacher_block_size=2))
    results = pool.run(with_and_without_teachers, PP2)
    for losses, _ in results:
        assert losses == pytest.approx(alone, rel=1e-9)
    assert {scored for _, scored in results} == {0, 4}


def refused(rank):
    """The errors of steps that one of two blocks cannot run."""
    errors = []
    schedules = (dict(max_cached_states=1), {})
    for schedule, cache in zip(schedules, (None, 100)):
        storage = {} if cache is None else dict(hidden_cache_bytes=cache)
        learner = learner_of(
            ["t0", "t1"],
            PP2,
            objective=dict(per_domain={"t1": dict(kind="sft")}),
            schedule=dict(micro_batch_size=4, kind="serial") | schedule,
            teacher_storage=storage,
        )
        step = plan_step(learner, of_domains(UNEVEN, 16))
        try:
            train_step(learner, [step])
        except ConfigError as error:
            errors.append(str(error))
    return bool(step.teachers), errors


def test_a_limit_that_one_block_cannot_meet_is_an_error_on_every_rank(pool):
    results = pool.run(refused)
    assert {has_teachers for has_teachers, _ in results} == {True, False}
    assert len({tuple(errors) for _, errors in results}) == 1
    ((states, size),) = {tuple(errors) for _, errors in results}
    assert "schedule.max_cached_states: 1 cannot be met" in states
    assert "teacher_storage.hidden_cache_bytes: 100 cannot hold the hidden states" in size
