"""Storage modes, cache placements and cache sizes change where bytes are, but not one bit of a result."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.problem import PlanRequest
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool
from tests._models import GQA, MOE

TP2_PP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2)
EP2_PP2 = dict(expert_model_parallel_size=2, pipeline_model_parallel_size=2)
# The same blocks in all modes: the default depends on the mode.
EP2_CP2 = dict(expert_model_parallel_size=2, context_parallel_size=2, teacher_block_size=2)
SHARDED, FILES, PARTS = dict(mode="host_sharded"), dict(mode="mmap"), dict(hidden_cache_bytes="least")
ON_DEVICE = dict(hidden_cache_device="device")
CASES = {
    # The second start with files finds them already written.
    "tp2-pp2": (GQA, TP2_PP2, [SHARDED, FILES, FILES, PARTS]),
    "ep2-pp2": (MOE, EP2_PP2, [SHARDED | PARTS, FILES]),
    "ep2-cp2": (MOE, EP2_CP2, [SHARDED | ON_DEVICE]),
    "dp4": (MOE, dict(teacher_block_size=4), [SHARDED, FILES | ON_DEVICE]),
    "dp4, blocks of 2": (MOE, dict(teacher_block_size=2), [SHARDED | PARTS, FILES]),
}


def two_steps(transformer, parallel, storage, directory):
    """Losses and a digest of this rank's weights after two steps, and bytes of teachers and of the cache."""
    sizes = {key: value for key, value in storage.items() if key != "hidden_cache_bytes"}
    learner = _models.make_learner(
        transformer,
        parallel,
        teacher_directory=directory,
        teacher_storage=sizes,
        schedule=dict(micro_batch_size=1),
        params_dtype="float32",
    )
    trajectories = [_models.batch(10, seed=step) for step in range(2)]
    if "hidden_cache_bytes" in storage:
        budget = least_budget([plan_step(learner, batch) for batch in trajectories])
        smaller = replace(learner.config.teacher_storage, hidden_cache_bytes=budget)
        learner.config = replace(learner.config, teacher_storage=smaller)
        learner.pipeline.cache_bytes = budget
    losses, peak = [], 0
    for batch in trajectories:
        batch = plan_step(learner, batch)
        losses.append(train_step(learner, [batch])["loss"])
        peak = max(peak, batch.cache.peak_bytes)
        assert len(batch.cache) == 0
    digest = hashlib.sha256()
    for chunk in learner.chunks:
        for parameter in chunk.parameters():
            digest.update(parameter.detach().numpy().tobytes())
    bank = learner.bank
    sizes = bank.host_bytes_by_mode(), bank.host_bytes(), bank.device_bytes(), bank.disk_bytes(), peak
    return losses, digest.hexdigest(), sizes


def least_budget(batches):
    """The smallest cache in which these steps can run; it does not hold all their states at once."""
    least = 0
    for batch in batches:
        costs = CostModel.build(1, teacher_forward=dict.fromkeys(batch.teachers, 1.0))
        request = PlanRequest(1, len(batch.student), costs, scoring=batch.scoring)
        assert request.smallest_cache() < sum(len(group.microbatches) for group in batch.scoring)
        least = max(least, request.smallest_cache() * batch.state_bytes)
    return least


def all_variants(rank, case, directory):
    transformer, parallel, variants = CASES[case]
    return [two_steps(transformer, parallel, storage, directory) for storage in [{}, *variants]]


@pytest.fixture(scope="module")
def pool():
    with RankPool(4, timeout=240) as ranks:
        yield ranks


@pytest.mark.parametrize("case", CASES)
def test_results_are_bitwise_equal(pool, tmp_path, case):
    for plain, *found in pool.run(all_variants, case, str(tmp_path)):
        losses, weights, (by_mode, host, device, _, _) = plain
        assert host == by_mode["host"]
        for storage, (other_losses, other_weights, sizes) in zip(CASES[case][2], found):
            assert other_losses == losses, storage
            assert other_weights == weights, storage
            assert sizes[0] == by_mode
            assert sizes[1] == by_mode[storage.get("mode", "host")]
            assert sizes[2] == device
            assert sizes[3] == (by_mode["host"] if storage.get("mode") == "mmap" else 0)
        if case.startswith("dp4"):  # the replicas of a block shard everything but the heads
            heads = 3 * 88 * 32 * 4  # three teachers, 83 columns padded to 88, width 32, float32
            replicas = CASES[case][1]["teacher_block_size"]
            assert by_mode["host_sharded"] == (by_mode["host"] - heads) / replicas + heads
    assert not list(tmp_path.rglob("*.incomplete"))
