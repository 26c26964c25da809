"""Teachers' LM heads arrive before they are read by losses over the vocabulary, or by the teachers' forward
passes if log-probs of sampled tokens are cached. Loads are counted, not timed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.pipeline.instructions import LoadHead, TeacherForward
from megatron_mopd.teachers.bank import TeacherSource
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool

TEACHERS = [f"t{number}" for number in range(5)]
DOMAINS = [f"d{number}" for number in range(6)]
ROUTING = {domain: TEACHERS[number % 5] for number, domain in enumerate(DOMAINS)}
SAMPLED = dict(kind="sampled_token")
# t0 serves both kinds: d0 compares sampled tokens, d5 whole vocabularies.
MIXED = dict(kind="full_vocab_kl", per_domain=dict.fromkeys(("d0", "d2", "d3"), "sampled_token"))
PP2 = dict(pipeline_model_parallel_size=2)


@pytest.fixture(scope="module")
def pools():
    with RankPool(1, timeout=120) as one, RankPool(2, timeout=120) as two:
        yield {1: one, 2: two}


def loads(rank, parallel, objective, kind):
    """Heads loaded ahead, heads loaded on demand, and the number of heads that were loaded but not read, in
    three steps of two micro-batches per domain; and the first plan's loads and forwards on the last stage."""
    model = _models.model_config(_models.DENSE)
    learner = _models.make_learner(
        _models.DENSE,
        parallel,
        objective=objective,
        sources=[TeacherSource(name, model, number) for number, name in enumerate(TEACHERS)],
        routing=ROUTING,
        schedule=dict(micro_batch_size=2, kind=kind),
        rollout=dict(temperature=1.0),
    )
    learner.domains = DOMAINS
    bank, ahead, late, unread = learner.bank, [], [], 0
    start, heads = bank._start_head, bank.heads

    def started(name, slot, keep):
        nonlocal unread
        (late if reading else ahead).append(name)
        unread += name in arrived  # it was evicted without being read
        arrived.add(name)
        start(name, slot, keep)

    def reads(names):
        nonlocal reading
        reading = True
        try:
            return heads(names)
        finally:
            reading = False
            arrived.difference_update(names)

    reading, arrived = False, set()
    bank._start_head, bank.heads = started, reads
    batches = deque()
    for step in range(3):
        samples = [
            _models.trajectory(t.index, list(t.prompt.token_ids), list(t.response_ids), DOMAINS[t.index % 6])
            for t in _models.batch(24, seed=step)
        ]
        samples = [replace(t, logprobs=(-1.0,) * len(t.response_ids)) for t in samples]
        batches.append(plan_step(learner, samples))
    while batches:
        train_step(learner, batches)
        batches.popleft()
    order = [
        (type(e), e.teacher if isinstance(e, LoadHead) else e.job.teacher)
        for e in learner.pipeline.recent[0].plan.stages[-1]
        if isinstance(e, LoadHead | TeacherForward)
    ]
    return ahead, late, unread + len(arrived), order


@pytest.mark.parametrize("objective", [SAMPLED, MIXED], ids=["sampled", "mixed"])
@pytest.mark.parametrize("parallel, kind", [({}, "bubble_fill"), (PP2, "bubble_fill"), (PP2, "serial")])
def test_no_work_starts_the_arrival_of_the_head_it_reads(pools, parallel, kind, objective):
    ahead, late, unread, order = pools[2 if parallel else 1].run(loads, parallel, objective, kind)[-1]
    assert late == []
    assert unread <= 1, "more than the head with which the next step would begin"
    if objective is SAMPLED:
        # Five teachers share two slots: each arrives once per step, while the previous one scores.
        assert len(ahead) <= 3 * 5 + 1
        for before, name in zip(TEACHERS, TEACHERS[1:]):
            first, scoring = order.index((TeacherForward, name)), (TeacherForward, before)
            assert (LoadHead, name) in order[:first] and scoring in order[order.index((LoadHead, name)) :]


def test_losses_that_read_whole_vocabularies_find_their_heads_too(pools):
    ahead, late, unread, _ = pools[2].run(loads, PP2, dict(kind="full_vocab_kl"), "bubble_fill")[-1]
    assert late == [] and unread == 0 and set(ahead) == set(TEACHERS)
