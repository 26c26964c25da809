"""The same prompts and seed give the same tokens in every parallel layout."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_mopd.backend import packed_weights
from tests import _models
from tests._distributed import RankPool, run_ranks
from tests.rollout import _engines
from tests.rollout._engines import engine, plain, prompts, sampling

TP, PP, VPP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
EP, ETP, CP = "expert_model_parallel_size", "expert_tensor_parallel_size", "context_parallel_size"
SP = "sequence_parallel"

DENSE_LAYOUTS = [
    {},
    {TP: 2, SP: True},
    {PP: 2},
    {PP: 2, VPP: 2},
    {TP: 2, CP: 2},
    {PP: 4},
]
MOE_LAYOUTS = [
    {},
    {TP: 2, SP: True},
    {PP: 2, VPP: 2},
    {EP: 2},
    {CP: 2, EP: 2},
    {TP: 2, SP: True, EP: 2, ETP: 1},
    {TP: 2, SP: True, PP: 2},
    {PP: 2, VPP: 2, EP: 2},
    {TP: 2, SP: True, EP: 2, ETP: 2},
    {TP: 2, SP: True, EP: 4, ETP: 1},
]


def ranks_of(layout: dict) -> int:
    """Ranks that dense layers and experts need, and at least two: the rest is data parallelism."""
    dense = layout.get(TP, 1) * layout.get(PP, 1) * layout.get(CP, 1)
    experts = layout.get(EP, 1) * layout.get(ETP, layout.get(TP, 1)) * layout.get(PP, 1)
    return max(dense, experts, 2)


def generate(rank, transformer, layout):
    """All cases in one layout: small batches, fewer prompts than ranks, truncated sampling, prompts with a
    common prefix."""
    made, chunks = engine(transformer, layout, max_batch_size=8)
    cases = [
        made.generate(prompts(7), sampling(max_new_tokens=6), seed=5, samples_per_prompt=2),
        made.generate(prompts(1), sampling(max_new_tokens=3, stop_token_ids=()), seed=6),
        made.generate(prompts(3), sampling(temperature=0.8, top_p=0.9, max_new_tokens=2), seed=7),
        made.generate(prompts(5, longest=5, common=9), sampling(max_new_tokens=3), seed=8),
    ]
    restored = all(
        chunk.config.sequence_parallel == layout.get(SP, False) and chunk.training for chunk in chunks
    )
    return [plain(case) for case in cases], restored


@pytest.fixture(scope="module")
def pools():
    """Pools of 2 and 4 ranks, forked once; after a failure kills a pool, the next test gets a new one."""
    made = {}

    def pool(size: int) -> RankPool:
        if size not in made or not made[size]._processes:
            made[size] = RankPool(size, timeout=40)
        return made[size]

    yield pool
    for each in made.values():
        each.close()


@pytest.fixture(scope="module")
def expected():
    """Each model's responses on one rank."""
    return {
        name: run_ranks(1, generate, getattr(_models, name), {})[0][0] for name in ("GQA", "MOE", "SHARED")
    }


def check(pool, name, layout, expected):
    for results, restored in pool.run(generate, getattr(_models, name), layout):
        assert restored
        for case, expected_case in zip(results, expected[name], strict=True):
            assert [row[:3] + row[4:] for row in case] == [row[:3] + row[4:] for row in expected_case]
            for row, expected_row in zip(case, expected_case):
                assert row[3] == pytest.approx(expected_row[3], abs=1e-6)


def test_the_cases_are_worth_comparing(expected):
    for cases in expected.values():
        assert len({token for _, _, response, *_ in cases[0] for token in response}) > 10
        assert {finished for *_, finished in cases[0]} == {True, False}
        assert len({len(response) for _, _, response, *_ in cases[0]}) > 3


@pytest.mark.parametrize("layout", DENSE_LAYOUTS, ids=str)
def test_dense(layout, pools, expected):
    check(pools(ranks_of(layout)), "GQA", layout, expected)


@pytest.mark.parametrize("layout", MOE_LAYOUTS, ids=str)
def test_mixture_of_experts(layout, pools, expected):
    check(pools(ranks_of(layout)), "SHARED" if len(layout) % 2 else "MOE", layout, expected)


def generate_packed(rank, transformer, layout):
    """Greedy responses with and without packed weights, each with the number of rows of every product that
    reads a plain weight."""
    made, _ = engine(transformer, layout, dtype="float32")
    rows: list[int] = []

    def linear(x, *others):
        rows.append(x[..., 0].numel())
        return F.linear(x, *others)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_weights, "F", SimpleNamespace(linear=linear))
        for packed in (True, False):
            _engines.pack_everything(packed)
            answers = made.generate(prompts(7), sampling(temperature=0.0, stop_token_ids=()), seed=5)
            results.append((plain(answers), rows.copy()))
            rows.clear()
    return results


@pytest.mark.parametrize(
    "transformer, layout",
    [
        ("GQA", {TP: 2, SP: True}),
        ("MOE", {EP: 2}),
        ("SHARED", {TP: 2, SP: True, EP: 2, ETP: 1}),
        ("SHARED", {TP: 2, SP: True, EP: 2, ETP: 2}),
        ("DENSE", {PP: 2}),
    ],
    ids=str,
)
def test_packed_weights(transformer, layout, pools):
    for packed, ordinary in pools(ranks_of(layout)).run(
        generate_packed, getattr(_models, transformer), layout
    ):
        for row, expected_row in zip(packed[0], ordinary[0], strict=True):
            assert row[:3] == expected_row[:3]
            assert row[3] == pytest.approx(expected_row[3], abs=3e-5)
        # Only long prompts and experts without a token read plain weights.
        assert all(rows == 0 or rows > 64 for rows in packed[1])
        assert sum(0 < rows <= 64 for rows in ordinary[1]) > 50


def chained(rank):
    six = _models.MOE | dict(num_moe_experts=6)
    layout = {TP: 2, SP: True, EP: 3, ETP: 1} if torch.distributed.get_world_size() == 6 else {}
    made, _ = engine(six, layout)
    return plain(made.generate(prompts(1), sampling(max_new_tokens=3, stop_token_ids=()), seed=5))


def test_expert_groups_that_overlap_replicas_without_nesting():
    """Expert groups {0 1 2} {3 4 5} link the replicas {0 1} {2 3} {4 5}; the first has the only prompt."""
    expected = run_ranks(1, chained)[0]
    for result in run_ranks(6, chained):
        assert [row[:3] for row in result] == [row[:3] for row in expected]
