"""Every family computes the same as `transformers` in every parallel layout, padded and packed."""

import random

import pytest
import torch

from megatron_mopd.backend.parallel import select_device
from tests._distributed import RankPool, run_ranks
from tests.model import _families, _running

ROWS = [[random.Random(7).randrange(_families.VOCAB) for _ in range(n)] for n in (14, 3, 9, 20, 2, 11)]
NEW_TOKENS = 8


def tp(n, sp=True):
    return dict(tensor_model_parallel_size=n, sequence_parallel=sp)


def pp(n, vpp=None):
    return dict(pipeline_model_parallel_size=n, virtual_pipeline_model_parallel_size=vpp)


def ep(n, etp=1):
    return dict(expert_model_parallel_size=n, expert_tensor_parallel_size=etp)


def cp(n):
    return dict(context_parallel_size=n)


# (ranks, case, layout)
GRID = [
    (2, "llama", tp(2, sp=False)),
    (2, "llama-mqa-head-dim-linear", pp(2)),
    (4, "llama-mha-biases-llama3", tp(4)),
    (4, "qwen2", tp(2) | pp(2)),
    (2, "qwen3", tp(2)),
    (4, "qwen3", tp(4)),  # more ranks than query groups
    (4, "qwen3-tied-biases-yarn", tp(2) | pp(2)),
    (4, "qwen3-moe", pp(2) | ep(2)),
    (4, "qwen3-moe-dense-layers-plain-topk", tp(2) | ep(2)),
    (4, "qwen2-moe", tp(2) | pp(2) | ep(2)),
    (4, "mixtral", tp(2) | pp(2) | ep(2)),
    (4, "olmoe", tp(4) | ep(2, 2)),  # more ranks than query groups
    (4, "olmoe-normalised-topk", tp(2) | pp(2) | ep(2)),
    (2, "deepseek-v3", pp(2)),
    (2, "deepseek-v3", cp(2)),
    (4, "deepseek-v3-plain", tp(4) | ep(2, 2)),
    (8, "deepseek-v3", tp(2) | pp(2) | ep(4)),
    (2, "glm4-moe-plain", tp(2) | ep(2)),
    (8, "glm4-moe", tp(2) | pp(2) | ep(2) | cp(2)),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Case -> directory, written on first use."""
    made = {}

    def directory(case):
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case)
            _families.make(case, made[case])
        return made[case]

    return directory


@pytest.fixture(scope="module")
def references(models):
    """(case, dtype) -> logits of every row from `transformers`."""
    made = {}

    def logits(case, dtype):
        if (case, dtype) not in made:
            made[case, dtype] = _families.reference_logits(models(case), ROWS, getattr(torch, dtype))
        return made[case, dtype]

    return logits


def difference(results, expected) -> float:
    """Largest difference; asserts that some rank computed every position of every row but the last."""
    worst = 0.0
    for batch in (0, 1):  # padded, packed
        seen = set()
        for result in results:
            for row, (positions, values) in result[batch].items():
                seen |= {(row, position) for position in positions}
                if positions:
                    worst = max(worst, (values - expected[row][positions]).abs().max().item())
        assert seen == {(row, p) for row, logits in enumerate(expected) for p in range(len(logits) - 1)}
    return worst


@pytest.mark.parametrize("case", _families.CASES)
def test_same_logits_as_transformers(case, models, references, pools):
    """Within 1e-4 in fp32. In fp64, only some parts are still fp32: rotary tables (the same on both sides)
    and, in some routers, the softmax or sigmoid of the scores.
    """
    pool = pools(1)
    results = pool.run(_running.logits, models(case), {}, "float32", ROWS)
    assert difference(results, references(case, "float32")) < 1e-4
    results = pool.run(_running.logits, models(case), {}, "float64", ROWS)
    routes_in_float32 = case in (
        "qwen3-moe",
        "mixtral",
        "deepseek-v3",
        "glm4-moe-plain",
        "olmoe-normalised-topk",
    )
    assert difference(results, references(case, "float64")) < (1e-5 if routes_in_float32 else 1e-12)


@pytest.mark.parametrize("ranks, case, layout", GRID, ids=str)
def test_same_logits_on_every_layout(ranks, case, layout, models, references, pools):
    if ranks == 8:  # may exceed the time limit of `pools`
        with RankPool(8, timeout=240) as pool:
            results = pool.run(_running.logits, models(case), layout, "float32", ROWS)
    else:
        results = pools(ranks).run(_running.logits, models(case), layout, "float32", ROWS)
    assert difference(results, references(case, "float32")) < 1e-4


@pytest.mark.parametrize(
    "ranks, case, layout",
    [
        (1, "llama-mha-biases-llama3", {}),
        (2, "glm4-moe", pp(2, 2)),
        (2, "olmoe", tp(2) | ep(2)),
        (2, "deepseek-v3", tp(2) | ep(2)),
    ],
    ids=str,
)
def test_same_greedy_continuation_as_transformers(ranks, case, layout, models, pools):
    """Decoding with our KV cache, with prompts of different lengths in one batch, against full forwards."""
    expected = _families.reference_greedy(models(case), ROWS, NEW_TOKENS)
    for result in pools(ranks).run(_running.greedy, models(case), layout, "float64", ROWS, NEW_TOKENS):
        assert [tokens for tokens, _ in result] == [tokens for tokens, _ in expected]
        for (_, found), (_, logprobs) in zip(result, expected):
            assert found == pytest.approx(logprobs, abs=1e-5)


def loaded_after_our_start(rank, directory):
    torch.utils._device._device_constructors.cache_clear()  # as in a process that has not filled the cache
    select_device("cpu")
    return _families.reference_logits(directory, ROWS, torch.float32)


def test_transformers_loads_the_same_model_after_our_start(models, references):
    """The CPU backend wraps torch's factories; `transformers` builds models under `torch.device("meta")`."""
    (found,) = run_ranks(1, loaded_after_our_start, models("llama"))
    assert all(map(torch.equal, found, references("llama", "float32")))
