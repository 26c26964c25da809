"""Teachers' output heads arrive before what reads them: losses over the vocabulary, or the teachers' own
forward passes where log-probs of sampled tokens are kept. Counted, not timed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.pipeline.instructions import LoadHead, TeacherForward
from megatron_mopd.training.step import plan_step, train_step
from tests import _models
from tests._distributed import RankPool

SAMPLED = dict(kind="sampled_token")
MIXED = dict(kind="full_vocab_kl", per_domain={"other": "sampled_token"})  # teacher c serves both kinds
PP2 = dict(pipeline_model_parallel_size=2)


@pytest.fixture(scope="module")
def pools():
    with RankPool(1, timeout=120) as one, RankPool(2, timeout=120) as two:
        yield {1: one, 2: two}


def loads(rank, parallel, objective, kind):
    """(heads started ahead, heads started by the work that needs them, heads read) in three steps, and the
    last plan's order of loads and teacher forwards on the last stage."""
    learner = _models.make_learner(
        _models.DENSE,
        parallel,
        objective=objective,
        schedule=dict(micro_batch_size=2, kind=kind),
        rollout=dict(temperature=1.0),
    )
    bank, ahead, late, read = learner.bank, [], [], []
    start, prefetch, heads = bank._start_head, bank.prefetch_head, bank.heads

    def started(name, slot, keep):
        (late if reading else ahead).append(name)
        start(name, slot, keep)

    def reads(names):
        nonlocal reading
        read.extend(names)
        reading = True
        try:
            return heads(names)
        finally:
            reading = False

    reading = False
    bank._start_head, bank.prefetch_head, bank.heads = started, prefetch, reads
    batches = deque()
    for step in range(3):
        samples = [replace(t, logprobs=(-1.0,) * len(t.response_ids)) for t in _models.batch(12, seed=step)]
        batches.append(plan_step(learner, samples))
    while batches:
        train_step(learner, batches)
        batches.popleft()
    order = []
    if learner.pipeline is not None:
        entries = learner.pipeline.recent[0].plan.stages[-1]
        order = [
            (type(e), e.teacher if isinstance(e, LoadHead) else e.job.teacher)
            for e in entries
            if isinstance(e, LoadHead | TeacherForward)
        ]
    return ahead, late, read, order


@pytest.mark.parametrize("objective", [SAMPLED, MIXED], ids=["sampled", "mixed"])
@pytest.mark.parametrize("parallel, kind", [({}, "bubble_fill"), (PP2, "bubble_fill"), (PP2, "serial")])
def test_no_work_starts_the_arrival_of_the_head_it_reads(pools, parallel, kind, objective):
    ahead, late, read, order = pools[2 if parallel else 1].run(loads, parallel, objective, kind)[-1]
    assert late == []
    assert set(ahead) <= set(read), "no head arrives that nothing reads"
    if objective is SAMPLED:
        # Three teachers share two slots: in every step each arrives once, but for what is still there.
        assert len(ahead) <= 3 * 3 + 1
        for name in dict.fromkeys(name for _, name in order):
            first = order.index((TeacherForward, name))
            assert (LoadHead, name) in order[:first]


def test_with_megatron_cores_schedule_heads_arrive_while_their_teachers_score(pools):
    ahead, late, read, _ = pools[1].run(loads, {}, SAMPLED, "megatron")[-1]
    assert late == [] and set(ahead) == set(read)


def test_losses_that_read_whole_vocabularies_find_their_heads_too(pools):
    ahead, late, read, _ = pools[2].run(loads, PP2, dict(kind="full_vocab_kl"), "bubble_fill")[-1]
    assert late == [] and set(ahead) == set(read)
