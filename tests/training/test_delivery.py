"""Sampled tokens travel once, to the ranks that train on them, and never become Python objects."""

from __future__ import annotations

import gc
import json
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_mopd.data.exchange import deliver_tokens, gather_tokens
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.losses.token_samples import TokenSamples
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.rollout.megatron_engine import MegatronEngine
from megatron_mopd.run.alarms import rollout_metrics
from megatron_mopd.run.evaluation import evaluate
from megatron_mopd.training import rewards as training_rewards
from megatron_mopd.training.rewards import Rewarder
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool
from tests._traffic import received_bytes

PP2, CP2, TP2 = ({f"{name}_parallel_size": 2} for name in ("pipeline_model", "context", "tensor_model"))
LAYOUTS = [(2, {}), (4, {}), (4, PP2), (4, CP2), (4, TP2)]
SAMPLES = 2


@pytest.fixture(scope="module")
def pools():
    with RankPool(1) as one, RankPool(2) as two, RankPool(4, timeout=120) as four:
        yield {1: one, 2: two, 4: four}


def prompts(count=13):
    rng = random.Random(3)
    ids = [[rng.randrange(_models.VOCAB) for _ in range(rng.randint(1, 12))] for _ in range(count)]
    return [
        Prompt("", i, ("arith", "text", "other")[n % 3], "1", "exact_match", None, n, f"prompt {n}")
        for n, i in enumerate(ids)
    ]


def engine_of(learner):
    return MegatronEngine(
        learner.chunks, learner.groups, vocab_size=_models.VOCAB, max_sequence_length=64, max_batch_size=64
    )


def sampled(rank, layout, dtype):
    """What a rank has of a rollout batch after sampling and after planning a step on it."""
    learner = _models.make_learner(
        _models.DENSE, layout, params_dtype=dtype, schedule=dict(micro_batch_size=3)
    )
    groups, sampling = learner.groups, SamplingParams(max_new_tokens=20, stop_token_ids=(1, 2, 3))
    with received_bytes(groups.dp) as received:
        trajectories = engine_of(learner).generate(prompts(), sampling, seed=1, samples_per_prompt=SAMPLES)
        metrics = rollout_metrics(trajectories, {})
        batch = plan_step(learner, trajectories)
    assert all(t.has_tokens == (t.sampled_by == groups.dp.rank()) for t in trajectories)
    trained = [t for micro_batch in batch.student for t in micro_batch.trajectories]
    assert sorted(t.index for t in trained) == [t.index for t in batch.trajectories if t.has_tokens]
    for t in trained:
        assert t.response_ids.dtype == np.int32 and str(t.logprobs.dtype) == dtype
        assert len(t.response_ids) == len(t.logprobs) == t.response_length
        assert t.logprob_sum == pytest.approx(float(t.logprobs.sum(dtype=float)), rel=1e-5)
    assert len({id(t.response_ids.base) for t in trained}) == 1, "not views of one array"
    held = {t.index: (t.response_ids.tolist(), t.logprobs.tolist()) for t in trained}
    own = sum(t.response_length * (4 + t.logprobs.itemsize) for t in trained)
    facts = [(t.index, t.response_length, t.finished, t.logprob_sum) for t in trajectories]
    return groups.dp.rank(), held, facts, metrics, sum(received), own


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks, layout", LAYOUTS, ids=str)
def test_tokens_are_exactly_where_they_are_trained(pools, ranks, layout, dtype):
    ((_, expected, facts, metrics, *_),) = pools[1].run(sampled, {}, dtype)
    assert len(expected) == len(facts) == 13 * SAMPLES
    assert {finished for _, _, finished, _ in facts} == {True, False}
    by_dp_rank = {}
    results = pools[ranks].run(sampled, layout, dtype)
    for dp_rank, held, found, found_metrics, received, own in results:
        assert [fact[:3] for fact in found] == [fact[:3] for fact in facts]
        assert found == results[0][2] and found_metrics == results[0][3], "ranks disagree"
        assert found_metrics == pytest.approx(metrics, rel=1e-5)
        assert received <= own + 32 * len(facts)
        assert by_dp_rank.setdefault(dp_rank, held) == held, "ranks of one replica differ"
    assert sorted(i for held in by_dp_rank.values() for i in held) == sorted(expected)
    for held in by_dp_rank.values():
        for index, (ids, logprobs) in held.items():
            assert ids == expected[index][0]
            assert logprobs == pytest.approx(expected[index][1], abs=3e-5)


def bytes_of_exchange(rank, each, length):
    """Bytes received for `each` trajectories of `length` tokens a rank, all of which move to another rank."""
    groups = _models.groups_for({})
    ranks, prompt = groups.dp_size, Prompt("", (1,), "d", None, "none")
    batch = [
        Trajectory(prompt, np.full(length, i), i, np.full(length, -1.0, np.float32), sampled_by=i % ranks)
        for i in range(each * ranks)
    ]
    here = [t if t.sampled_by == rank else t.without_tokens() for t in batch]
    wanted = [[i for i in range(len(batch)) if (i + 1) % ranks == to] for to in range(ranks)]
    with received_bytes() as received:
        found = deliver_tokens(here, wanted, groups.dp, groups.device, np.dtype(np.float32))
    assert [t.has_tokens for t in found] == [t.index in wanted[rank] for t in batch]
    assert all(t == batch[t.index] for t in found if t.has_tokens)
    return sum(received)


def test_the_bytes_of_a_rank_do_not_grow_with_the_number_of_ranks(pools):
    two, four = (pools[n].run(bytes_of_exchange, 6, 50) for n in (2, 4))
    assert set(two) == set(four) == {6 * 50 * 8}
    assert set(pools[4].run(bytes_of_exchange, 6, 100)) == {2 * 6 * 50 * 8}


def step(rank, layout, kind, is_sampled):
    """Loss and gradients of a step on given trajectories, or the same with tokens only where sampled."""
    learner = _models.make_learner(
        _models.MOE if layout is PP2 else _models.GQA,
        layout,
        kind=kind,
        objective={"kind": kind} | ({"rollout_correction": "tis"} if kind == "sampled_token" else {}),
        schedule=dict(max_tokens_per_micro_batch=40),
    )
    rng = random.Random(0)
    batch = [replace(t, logprobs=[-4 * rng.random() for _ in t.response_ids]) for t in _models.batch(16)]
    if is_sampled:
        groups = learner.groups
        batch = [replace(t, sampled_by=(7 * t.index + 1) % groups.dp_size) for t in batch]
        batch = [t if t.sampled_by == groups.dp.rank() else t.without_tokens() for t in batch]
    metrics = train_step(learner, [plan_step(learner, batch)])
    metrics = {name: value for name, value in metrics.items() if not name.startswith(("time/", "idle/"))}
    return metrics, _models.pieces(learner, gradients=True)


@pytest.mark.parametrize("kind", ["full_vocab_kl", "sampled_token", "sft"])
@pytest.mark.parametrize("ranks, layout", LAYOUTS, ids=str)
def test_losses_and_gradients_are_those_of_tokens_that_every_rank_has(pools, ranks, layout, kind):
    given = pools[ranks].run(step, layout, kind, False)
    sent = pools[ranks].run(step, layout, kind, True)
    for (metrics, pieces), (expected_metrics, expected) in zip(sent, given, strict=True):
        assert metrics["loss"] == expected_metrics["loss"] != 0
        assert metrics["grad_norm"] == expected_metrics["grad_norm"] != 0
        for (*name, values), (*expected_name, expected_values) in zip(pieces, expected, strict=True):
            assert name == expected_name and torch.equal(values, expected_values)


class _Numbers:
    """A tokenizer whose texts are the ids themselves."""

    def decode(self, ids):
        assert all(type(i) is int for i in ids)
        return "".join(f"<{i}>" for i in ids)


def reported(rank, layout, directory):
    """The samples for the report of a step that is skipped because of a log-prob, and its evidence."""
    learner = _models.make_learner(
        _models.DENSE, layout, schedule=dict(micro_batch_size=3), run_dir=str(directory)
    )
    groups = learner.groups
    batch = [
        replace(
            t, logprobs=[-0.1 * i for i, _ in enumerate(t.response_ids)], sampled_by=t.index % groups.dp_size
        )
        for t in _models.batch(16)
    ]
    batch[0] = replace(batch[0], logprobs=np.full_like(batch[0].logprobs, np.nan))
    batch = [t if t.sampled_by == groups.dp.rank() else t.without_tokens() for t in batch]
    planned = plan_step(learner, batch)
    samples = TokenSamples(planned.trajectories, 3, groups)
    train_step(learner, [planned], samples)
    evidence = directory / "evidence" / "iter_0000001" / "batch.json"
    return list(samples.lines(_Numbers())), rank == 0 and json.loads(evidence.read_text())


@pytest.mark.parametrize("ranks, layout", LAYOUTS, ids=str)
def test_reports_and_evidence_have_the_tokens_of_all_ranks(pools, ranks, layout, tmp_path):
    ((expected, _),) = pools[1].run(reported, {}, tmp_path / "one")
    batch = {t.index: t for t in _models.batch(16)}
    assert len(expected) == 9
    for index, entry in expected:
        ids = batch[index].response_ids.tolist()
        logprobs = [None if index == 0 else pytest.approx(-0.1 * i) for i, _ in enumerate(ids)]
        assert entry["tokens"] == [f"<{i}>" for i in ids] and entry["logprobs"] == logprobs
    results = pools[ranks].run(reported, layout, tmp_path / "several")
    for lines, _ in results:
        for (index, entry), (expected_index, expected_entry) in zip(lines, expected, strict=True):
            assert index == expected_index
            assert entry.pop("kl") == pytest.approx(expected_entry["kl"], abs=1e-5)
            assert entry == {key: value for key, value in expected_entry.items() if key != "kl"}
    evidence = results[0][1]
    assert "token 0 of response 0 (domain" in evidence["causes"][0] and "nan" in evidence["causes"][0]
    assert [sample["index"] for sample in evidence["batch"]] == list(range(16))
    for index, sample in enumerate(evidence["batch"]):
        assert sample["prompt_ids"] == batch[index].prompt.token_ids.tolist()
        assert sample["response_ids"] == batch[index].response_ids.tolist()
        expected = ["nan" if index == 0 else repr(-0.1 * i) for i, _ in enumerate(sample["response_ids"])]
        assert sample["logprobs"] == expected


def blocks(rank, length):
    """Objects that exist because of a planned step on responses of `length` tokens: blocks of memory of
    Python's allocator, which holds every number, tuple and list, but no array's contents."""
    learner = _models.make_learner(_models.DENSE, {}, schedule=dict(micro_batch_size=4))
    groups, rng = learner.groups, np.random.default_rng(0)
    ids = rng.integers(1000, _models.VOCAB * 1000, size=length, dtype=np.int32)  # small ints are not new
    logprobs = rng.random(length, dtype=np.float32)

    def planned():
        prompt = Prompt("", ids[:9], "arith", None, "none")
        batch = [Trajectory(prompt, ids, i, logprobs, sampled_by=i % groups.dp_size) for i in range(16)]
        batch = [t if t.sampled_by == groups.dp.rank() else t.without_tokens() for t in batch]
        return plan_step(learner, batch), rollout_metrics(batch, {}), gather_tokens(batch, groups.dp)

    planned()
    gc.collect()
    before = sys.getallocatedblocks()
    kept = planned()
    gc.collect()
    return sys.getallocatedblocks() - before, kept[1]["length/arith"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_number_of_objects_does_not_grow_with_the_number_of_tokens(pools, ranks):
    short, long = pools[ranks].run(blocks, 50), pools[ranks].run(blocks, 5000)
    for (few, length), (many, longer) in zip(short, long, strict=True):
        assert (length, longer) == (50, 5000) and few > 0
        assert many - few < 500, "16 x 4950 more tokens"


class _Words:
    def __init__(self):
        self.decoded = 0

    def decode(self, ids):
        assert type(ids) is list
        self.decoded += 1
        return "1" if sum(ids) % 3 else "0"


def judged(rank, layout):
    """Metrics of an evaluation, and what this rank decoded for it."""
    learner = _models.make_learner(_models.DENSE, layout)
    sampling, words = SamplingParams(max_new_tokens=5, temperature=0.0, stop_token_ids=(1,)), _Words()
    asked = prompts()
    found = evaluate(engine_of(learner), asked, words, sampling, learner.groups, seed=0)
    return found, words.decoded


@pytest.mark.parametrize("ranks, layout", LAYOUTS, ids=str)
def test_an_evaluation_judges_every_response_once_where_it_was_sampled(pools, ranks, layout):
    ((expected, count),) = pools[1].run(judged, {})
    assert count == 13 and 0 < expected["accuracy"] < 1
    results = pools[ranks].run(judged, layout)
    assert sum(count for _, count in results) == 13 and max(count for _, count in results) <= 7
    assert all(found == expected for found, _ in results)


class _Workers:
    """Judges a response by its text."""

    def __init__(self, *settings):
        self.texts = []

    def submit(self, pairs):
        self.texts += [text for _, text in pairs]
        return pairs

    def close(self):
        pass


def rewarded(rank, layout):
    """Rewards by index on this rank, and the number of responses it judged."""
    objective, rollout = dict(kind="grpo"), dict(samples_per_prompt=SAMPLES)
    learner = _models.make_learner(_models.DENSE, layout, objective=objective, rollout=rollout)
    training_rewards.RewardWorkers = _Workers
    training_rewards.scores_of = lambda pairs: [
        training_rewards.Score(float(text.count("1"))) for _, text in pairs
    ]
    sampling = SamplingParams(max_new_tokens=9, stop_token_ids=(1, 2))
    trajectories = engine_of(learner).generate(prompts(), sampling, seed=4, samples_per_prompt=SAMPLES)
    rewarder = Rewarder(learner.config, learner.groups, lambda ids: " ".join(map(str, ids)))
    with received_bytes(learner.groups.dp) as received:
        found = rewarder.start(trajectories).collect()
    judged_here = rewarder._workers.texts if rewarder._workers is not None else []
    rewarder.close()
    assert not received
    return found, len(judged_here), learner.groups.replica_rank


@pytest.mark.parametrize("ranks, layout", LAYOUTS[:3], ids=str)
def test_rewards_are_judged_where_responses_were_sampled(pools, ranks, layout):
    ((expected, count, _),) = pools[1].run(rewarded, {})
    assert count == len(expected) == 13 * SAMPLES and len(set(expected.values())) > 2
    results = pools[ranks].run(rewarded, layout)
    assert all(found == expected for found, *_ in results)
    assert sum(count for _, count, _ in results) == 13 * SAMPLES
    assert all((count > 0) == (replica_rank == 0) for _, count, replica_rank in results)


def gathered(rank):
    groups = _models.groups_for({})
    here = [replace(t, sampled_by=t.index % groups.dp_size) for t in _models.batch(7)]
    here = [t if t.sampled_by == rank else t.without_tokens() for t in here]
    return [(t.index, t.has_tokens and t.response_ids.tolist()) for t in gather_tokens(here, groups.dp)]


def test_the_first_rank_can_gather_all_tokens(pools):
    first, *_ = pools[4].run(gathered)
    assert first == [(t.index, t.response_ids.tolist()) for t in _models.batch(7)]
