"""Storage modes, cache placements and part sizes change where bytes are, and not one bit of a result."""

from __future__ import annotations

import hashlib

import pytest
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.training.step import learn, plan_step, score
from tests import _models
from tests._distributed import RankPool
from tests._models import GQA, MOE

TP2_PP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2)
EP2_PP2 = dict(expert_model_parallel_size=2, pipeline_model_parallel_size=2)
EP2_CP2 = dict(expert_model_parallel_size=2, context_parallel_size=2)
# The first layout's replicas of dense weights, of experts, or both are more than one rank in some row.
CASES = [(GQA, TP2_PP2), (MOE, EP2_PP2), (MOE, EP2_CP2), (MOE, {})]


def two_steps(rank, transformer, parallel, storage, directory):
    """(losses, digest of the weights after two steps, host bytes by mode, host, device and disk bytes)."""
    learner = _models.make_learner(
        transformer,
        parallel,
        teacher_directory=directory,
        teacher_storage=storage,
        schedule=dict(micro_batch_size=2),
        params_dtype="float32",
    )
    losses = []
    for step in range(2):
        batch = plan_step(learner, _models.batch(12, seed=step))
        score(learner, batch)
        losses.append(learn(learner, batch)["loss"])
    digest = hashlib.sha256()
    for chunk in learner.chunks:
        for parameter in chunk.parameters():
            digest.update(parameter.detach().numpy().tobytes())
    bank = learner.bank
    by_mode = bank.host_bytes_by_mode()
    return losses, digest.hexdigest(), by_mode, bank.host_bytes(), bank.device_bytes(), bank.disk_bytes()


@pytest.fixture(scope="module")
def pool():
    with RankPool(4, timeout=120) as ranks:
        yield ranks


@pytest.mark.parametrize("transformer, parallel", CASES, ids=["tp2-pp2", "ep2-pp2", "ep2-cp2", "dp4"])
def test_results_are_bitwise_equal(pool, tmp_path, transformer, parallel):
    plain = pool.run(two_steps, transformer, parallel, {}, "unused")
    for storage in (dict(mode="host_sharded"), dict(mode="mmap")):
        found = pool.run(two_steps, transformer, parallel, storage, str(tmp_path))
        for (losses, weights, by_mode, host, device, disk), expected in zip(found, plain):
            assert losses == expected[0]
            assert weights == expected[1]
            assert by_mode == expected[2] and expected[3] == by_mode["host"]
            assert host == by_mode[storage["mode"]]
            assert device == expected[4]
            if storage["mode"] == "mmap":
                assert host == 0 and disk == by_mode["host"]
    # The files of the first start serve the second one.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.weights")}
    pool.run(two_steps, transformer, parallel, dict(mode="mmap"), str(tmp_path))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.weights")}
    assert not list(tmp_path.rglob("*.incomplete"))


def test_sharded_bytes_are_the_replicas_share(pool):
    """Four replicas keep a quarter of everything but the heads."""
    by_mode = pool.run(two_steps, MOE, {}, {}, "unused")[0][2]
    heads = 3 * 88 * 32 * 4  # three teachers, 83 columns padded to 88, width 32, float32
    assert by_mode["host_sharded"] == (by_mode["host"] - heads) / 4 + heads
