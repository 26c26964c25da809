"""NaN or infinite logits: with every kind of loss, all ranks skip the step, report the cause and continue."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from megatron_mopd.losses import batch_loss
from megatron_mopd.losses.teacher_scores import TeacherScores
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool

KINDS = {
    "vocabulary": {
        "arith": dict(kind="full_vocab_kl", rollout_correction="icepop"),
        "text": dict(kind="full_vocab_kl"),  # two teachers in one softmax
        "other": dict(kind="forward_kl", add={"top_k_kl": 0.5}, top_k=3),
    },
    "tokens": {
        "arith": dict(kind="sampled_token", log_ratio_clamp=0.5, rollout_correction="tis"),
        "text": dict(kind="sampled_token", add={"jsd": 1.0}),
        "other": dict(kind="sft"),
    },
    "outcomes": {
        "arith": dict(kind="sampled_token", policy_loss="ppo_clip"),
        "text": dict(kind="top_k_kl", top_k=3, top_k_from="student"),
        "other": dict(kind="grpo"),
    },
}
"""Every kind of objective, alone or combined with another in some domain."""
LAYOUTS = {
    "tp": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp": dict(pipeline_model_parallel_size=2),
    "cp": dict(context_parallel_size=2),
    "ep": dict(expert_model_parallel_size=2),
}
TEACHER_OF = {"arith": "a", "text": "c", "other": "c"}
"""A teacher of each domain; in "text" it is the second of two."""


@pytest.fixture(scope="module")
def pool():
    with RankPool(2, timeout=120) as pool:
        yield pool


def plan(learner):
    trajectories = [dataclasses.replace(t, logprobs=(-3.0,) * len(t.response_ids)) for t in _models.batch(8)]
    assert {t.domain for t in trajectories} == set(TEACHER_OF)
    return plan_step(learner, trajectories)


def weights(learner):
    named = [item for chunk in learner.chunks for item in unwrap(chunk).state_dict().items()]
    return {name: value.clone() for name, value in named if isinstance(value, torch.Tensor)}


def poison_token(monkeypatch, domain, value):
    """Poison one element of the student's hidden state before the first response token of a domain."""
    original, done = batch_loss.response_hidden, []

    def poisoned(hidden, micro_batch, groups):
        rows = original(hidden, micro_batch, groups)
        start = 0
        for trajectory, count in zip(micro_batch.trajectories, micro_batch.loss_counts):
            if trajectory.domain == domain and count and not done:
                done.append(True)
                spot = torch.zeros_like(rows)
                spot[start, 0] = value
                rows = rows + spot
            start += count
        return rows

    monkeypatch.setattr(batch_loss, "response_hidden", poisoned)


def poison_teacher(monkeypatch, teacher, value):
    """Poison one channel of a teacher's hidden states in every micro-batch that it scores."""
    original = TeacherScores.keep

    def poisoned(self, name, micro_batch, hidden):
        if name == teacher:
            hidden = hidden.clone()
            hidden[:, :, 0] = value
        original(self, name, micro_batch, hidden)

    monkeypatch.setattr(TeacherScores, "keep", poisoned)


def poison_weight(learner, value):
    """Poison one element of the last stage's final norm, if this rank has it; returns a function that
    restores it."""
    found = dict(unwrap(learner.chunks[-1]).named_parameters()).get("decoder.final_layernorm.weight")
    if found is None:
        return lambda: None
    before = found.data[3].clone()
    found.data[3] = value

    def undo():
        found.data[3] = before

    return undo


def skipped(learner, directory):
    """Run one step that must be skipped and return the causes in its evidence."""
    before, total = weights(learner), learner.skipped.total
    metrics = train_step(learner, [plan(learner)])
    assert metrics["skipped_steps"] == learner.skipped.total == total + 1 and math.isnan(metrics["grad_norm"])
    after = weights(learner)
    assert all(torch.equal(before[name].nan_to_num(7.0), after[name].nan_to_num(7.0)) for name in before)
    evidence = directory / "evidence" / f"iter_{total + learner.scheduler.num_steps + 1:07d}" / "batch.json"
    torch.distributed.barrier()
    return json.loads(evidence.read_text())["causes"]


def every_fault(rank, case, layout, schedule, directory):
    """Inject each kind of fault in one run, with a healthy step after each; returns the reported causes."""
    learner = _models.make_learner(
        # Sigmoid routing with expert biases, which megatron-core updates before the guard runs.
        _models.SHARED if layout == "ep" else _models.GQA,
        LAYOUTS[layout],
        objective=dict(per_domain=KINDS[case], chunk_size=7),
        schedule=dict(global_batch_size=8, micro_batch_size=3, kind=schedule),
        rollout=dict(samples_per_prompt=2),
        guard=dict(max_skipped_steps=1),
        run_dir=str(directory),
    )

    def sound_step():
        before = weights(learner)
        metrics = train_step(learner, [plan(learner)])
        assert math.isfinite(metrics["loss"]) and learner.skipped.in_a_row == 0
        after = weights(learner)
        assert any(not torch.equal(before[name], after[name]) for name in before)

    found = {}
    for domain in KINDS[case]:
        with pytest.MonkeyPatch.context() as patch:
            # On one rank only, except under tensor parallelism, where all ranks have the same hidden states.
            if rank == 1 or layout == "tp":
                poison_token(patch, domain, math.nan if domain == "arith" else math.inf)
            found["token", domain] = skipped(learner, directory)
        sound_step()
    for domain, objective in KINDS[case].items():
        if objective["kind"] in ("sft", "grpo"):
            continue
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1 or layout == "tp":
                poison_teacher(patch, TEACHER_OF[domain], math.nan)
            found["teacher", domain] = skipped(learner, directory)
        sound_step()
    undo = poison_weight(learner, math.nan) if rank == 1 or layout != "ep" else lambda: None
    found["weight", "all"] = skipped(learner, directory)
    assert learner.skipped.weights_damaged
    undo()
    sound_step()
    assert not learner.skipped.weights_damaged
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", KINDS)
def test_every_loss_leaves_its_step_out_and_goes_on(pool, tmp_path, case, layout):
    schedule = "megatron" if layout == "cp" else "bubble_fill"
    reports = pool.run(every_fault, case, layout, schedule, tmp_path)
    assert reports[0] == reports[1]
    for (fault, domain), causes in reports[0].items():
        assert causes, (fault, domain)
        if fault == "token":
            assert any(f"domain '{domain}'" in cause and "student: logit of" in cause for cause in causes), (
                causes
            )
        elif fault == "teacher":
            assert all(f"teacher '{TEACHER_OF[domain]}': logit of" in cause for cause in causes), causes
        else:
            assert causes[0].startswith("the student's weight ") and "on rank" in causes[0]
