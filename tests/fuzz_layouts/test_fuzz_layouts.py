"""Random layouts match one rank, and so do cases that once failed; the fuzzer finds a planted bug."""

from __future__ import annotations

import itertools
from copy import deepcopy
from typing import get_args

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.choices import ObjectiveKind
from megatron_mopd.training import optimizer
from tests.fuzz_layouts.__main__ import CASES
from tests.fuzz_layouts.case import Case
from tests.fuzz_layouts.compare import differences
from tests.fuzz_layouts.draw import draw_case
from tests.fuzz_layouts.judge import Pools, Verdict, judge
from tests.fuzz_layouts.run import Outcome
from tests.fuzz_layouts.shrink import shrink

SEEDS = range(20)
KEPT = sorted(CASES.glob("*.json"))


@pytest.fixture(scope="module")
def pools():
    with Pools(timeout=150) as pools:
        yield pools


@pytest.mark.parametrize("seed", sorted(SEEDS, key=lambda seed: draw_case(seed, most_ranks=4).ranks))
def test_a_random_layout_computes_what_one_rank_does(seed, pools):
    case = draw_case(seed, most_ranks=4)
    verdict = judge(case, pools)
    assert verdict.is_fine, f"{case}: {verdict.kind}\n{verdict.detail}"


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_layout_that_was_wrong_once(path, pools):
    verdict = judge(Case.load(path), pools)
    assert verdict.kind == "right", f"{verdict.kind}\n{verdict.detail}"


def test_a_planted_bug_is_found(monkeypatch):
    """If experts are not marked, their gradients are reduced over the other parameters' ranks."""
    monkeypatch.setattr(optimizer, "mark_experts", _unmark_experts)
    drawn = (draw_case(seed, most_ranks=2) for seed in range(1000))
    affected = (case for case in drawn if case.student.get("num_moe_experts") and _splits_experts(case))
    with Pools(timeout=150) as pools:  # forked with the bug
        verdicts = [judge(case, pools) for case in itertools.islice(affected, 2)]
    assert any(verdict.kind == "wrong" and ".experts." in verdict.detail for verdict in verdicts)


def _unmark_experts(chunks, groups):
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.allreduce = True


def _splits_experts(case: Case) -> bool:
    return case.size("ep") > 1 or case.size("etp") != case.size("tp")


def test_every_number_is_compared():
    """A difference in one metric, one element of a gradient or weight, or one expert's bias is detected."""
    case = draw_case(0)

    def outcome() -> Outcome:
        weight = ("decoder.weight", (2, 2), (0, 0), torch.ones(2, 2, dtype=torch.float64))
        metrics = {"loss": 1.0, "kl/d0": 0.5, "seconds/train": 0.1}
        return Outcome([metrics], [[deepcopy(weight)]], [deepcopy(weight)], {1: torch.zeros(2)})

    other = outcome()
    other.metrics[0]["seconds/train"] = 3.0
    assert differences(case, outcome(), [outcome(), other]) == []
    tampered = [outcome() for _ in range(5)]
    tampered[0].metrics[0]["kl/d0"] = 0.501
    tampered[1].gradients[0][0][3][1, 1] = 1.001
    tampered[2].weights[0][3][0, 1] = float("nan")
    tampered[3].expert_biases[1][0] = 1e-3
    del tampered[4].metrics[0]["kl/d0"]
    for each in tampered:
        assert len(differences(case, outcome(), [each])) == 1


def test_a_case_follows_from_its_seed_and_survives_its_file(tmp_path):
    for seed in range(50):
        case = draw_case(seed)
        case.save(tmp_path / "case.json")
        assert Case.load(tmp_path / "case.json") == case == draw_case(seed)


def test_everything_is_drawn():
    """A few hundred cases cover every size, schedule, storage, recomputation, objective and switch."""
    cases = [draw_case(seed) for seed in range(600)]

    def values(section: str, key: str) -> set:
        return {getattr(case, section).get(key) for case in cases}

    for short in ("tp", "pp", "vpp", "cp", "ep", "etp"):
        assert {1, 2} < {case.size(short) for case in cases}
    assert {1, 2, 3, 4, 6, 8} == {case.ranks for case in cases}
    assert values("schedule", "kind") == {"bubble_fill", "back_to_back", "serial"}
    assert values("storage", "mode") == {"host", "host_sharded", "mmap"}
    assert values("storage", "dtype") == {None, "int8", "fp8"}
    assert any(case.storage.get("dtype") and case.size("tp") > 1 for case in cases)
    assert values("recompute", "recompute_method") == {None, "uniform", "block"}
    recomputed = {module for case in cases for module in case.recompute.get("recompute_modules", ())}
    assert recomputed == {"core_attn", "mlp", "layernorm", "moe", "mla_up_proj", "shared_experts"}
    for key in ("overlap_grad_reduce", "use_distributed_optimizer", "freeze_router", "freeze_expert_bias"):
        assert True in values("optimizer", key)
    assert {0.01, 0.1, 1.0} < values("student", "moe_aux_loss_coeff")
    assert {0.001, 0.1} < values("student", "moe_z_loss_coeff")
    kinds = {o["kind"] for case in cases for o in case.objective["per_domain"].values()}
    assert kinds == set(get_args(ObjectiveKind))
    assert {key for case in cases for key in case.spare} == {"bytes", "states"}
    assert any(case.routing_replay for case in cases)


def test_shrinking_keeps_what_makes_a_case_fail():
    """Everything is removed except the pipeline and the one sample that cause the failure."""

    def verdict(case: Case) -> Verdict:
        tokens = {token for batch in case.batches for sample in batch for token in sample["prompt"]}
        fails = case.parallel.get("pipeline_model_parallel_size", 1) > 1 and token in tokens
        return Verdict("failed", "RuntimeError: planted") if fails else Verdict("right")

    case = next(c for c in map(draw_case, range(1000)) if c.size("pp") > 1 and c.size("tp") > 1)
    token = case.batches[0][0]["prompt"][0]
    small = shrink(case, verdict(case), verdict, minutes=1)
    assert verdict(small).kind == "failed"
    assert small.size("pp") > 1 and small.size("tp") == small.size("cp") == 1
    assert [len(batch) for batch in small.batches] == [1] and len(small.teachers) == 1
    assert small.optimizer == small.recompute == small.spare == {} and small.storage == {"mode": "host"}
