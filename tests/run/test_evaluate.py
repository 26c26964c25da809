"""pass@k against the fraction of subsets that it estimates, and which checkpoint is the best."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.distributed as dist

from megatron_mopd.config import ConfigError, config_from_dict
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.model.checkpoint import MODEL_FILE
from megatron_mopd.run import best_checkpoint as module
from megatron_mopd.run.best_checkpoint import BEST_FILE, BestCheckpoint, best_iteration
from megatron_mopd.run.evaluation import evaluate_pass_at, pass_at_k


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples):
    for correct in range(samples + 1):
        answers = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(answers, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)


class _Alone:
    def rank(self):
        return 0


class _Groups:
    device, dp, dp_size, replica_rank, replica_size = torch.device("cpu"), _Alone(), 1, 0, 1


class _Tokenizer:
    def decode(self, ids):
        return " ".join(map(str, ids))


class _Engine:
    """Generates four samples per prompt; the first i samples of prompt i are correct."""

    def generate(self, prompts, sampling, *, seed, samples_per_prompt=1):
        return [
            Trajectory(prompt, (7,) if sample < number else (8,), number * samples_per_prompt + sample)
            for number, prompt in enumerate(prompts)
            for sample in range(samples_per_prompt)
        ]


def test_every_domain_counts_its_own_prompts(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    domains = ["copy", "add", "add", "none"]
    answers = ["7", "7", "7", None]
    prompts = [Prompt("", (1,), d, a, "exact_match") for d, a in zip(domains, answers)]
    metrics = evaluate_pass_at(
        _Engine(), prompts, _Tokenizer(), None, _Groups(), seed=0, pass_at=[1, 2], samples_per_prompt=4
    )
    expected = {"pass_at_1/copy": 0.0, "pass_at_1/add": 3 / 8, "pass_at_1": 3 / 16}
    # 1 and 2 of 4 correct: 1 - C(3,2)/6 = 1/2 and 1 - C(2,2)/6 = 5/6.
    expected |= {"pass_at_2/copy": 0.0, "pass_at_2/add": (1 / 2 + 5 / 6) / 2, "pass_at_2": 1 / 3}
    assert metrics == pytest.approx(expected)


def write_checkpoints(directory, iterations):
    for iteration in iterations:
        path = directory / f"iter_{iteration:07d}"
        path.mkdir(parents=True)
        (path / MODEL_FILE).write_text("{}")


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(module.dist, "broadcast_object_list", lambda objects: None)


def test_the_best_of_the_complete_checkpoints(tmp_path, alone):
    best = BestCheckpoint(tmp_path, "accuracy")
    assert best_iteration(tmp_path) is None
    write_checkpoints(tmp_path, [2, 4, 6])
    for iteration, value in ((2, 0.5), (4, 0.75), (6, 0.75), (8, 0.9)):
        assert best.is_new({"accuracy": value}) == (iteration != 6)
        best.saved(iteration, {"accuracy": value, "loss": 3.0})
    best.saved(10, {"loss": 1.0})  # saved without an evaluation
    assert not best.is_new({"loss": 1.0}) and not best.is_new({"accuracy": float("nan")})
    assert best_iteration(tmp_path) == 6, "8 is not complete; the later of two equal ones counts"
    assert json.loads((tmp_path / BEST_FILE).read_text())["best"] == 8
    (tmp_path / "iter_0000006" / MODEL_FILE).unlink()
    assert best_iteration(tmp_path) == 4


def test_what_was_written_beyond_a_resume_is_forgotten(tmp_path, alone):
    first = BestCheckpoint(tmp_path, "accuracy")
    for iteration in (2, 4, 6):
        first.saved(iteration, {"accuracy": iteration / 10})
    resumed = BestCheckpoint(tmp_path, "accuracy", 4)
    assert resumed.is_new({"accuracy": 0.5}) and not resumed.is_new({"accuracy": 0.4})
    assert json.loads((tmp_path / BEST_FILE).read_text())["best"] == 4
    assert BestCheckpoint(tmp_path, "accuracy/add", 4).is_new({"accuracy/add": 0.0}), "another metric"
    (tmp_path / BEST_FILE).write_text('{"values": {"4')
    assert best_iteration(tmp_path) is None
    assert BestCheckpoint(tmp_path, "accuracy", 4).is_new({"accuracy": 0.0}), "a damaged file is ignored"


def test_values_of_another_evaluation_are_forgotten(tmp_path, alone):
    BestCheckpoint(tmp_path, "accuracy", 0, "held-out A").saved(2, {"accuracy": 0.5})
    assert not BestCheckpoint(tmp_path, "accuracy", 2, "held-out A").is_new({"accuracy": 0.4})
    assert BestCheckpoint(tmp_path, "accuracy", 2, "held-out B").is_new({"accuracy": 0.4})
    earlier_release = {"metric": "accuracy", "best": 2, "values": {"2": 0.5}}
    (tmp_path / BEST_FILE).write_text(json.dumps(earlier_release))
    assert not BestCheckpoint(tmp_path, "accuracy", 2, "held-out B").is_new({"accuracy": 0.4})


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"evaluation": {"pass_at": [1, 0]}, "data": {"eval": [{"task": "gcd"}]}}, "at least 1"),
        ({"evaluation": {"pass_at": [4]}}, "data.eval"),
        (
            {"evaluation": {"pass_at": [4], "samples_per_prompt": 2}, "data": {"eval": [{"task": "gcd"}]}},
            "cannot estimate pass@4",
        ),
        ({"evaluation": {"temperature": 0}}, "evaluation.temperature: must be above 0, found 0"),
    ],
)
def test_impossible_settings(sections, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"run_dir": "x"} | sections)
