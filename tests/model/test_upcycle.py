"""An upcycled model computes the same as the dense one, here and in `transformers`."""

from pathlib import Path

import pytest
import torch

from megatron_mopd.config import ConfigError
from megatron_mopd.model.convert import (
    MegatronCheckpoint,
    open_checkpoint,
    write_hugging_face,
    write_megatron,
)
from megatron_mopd.model.upcycle import UpcycledModel, Upcycling
from tests._distributed import RankPool
from tests.model import _families, _running
from tests.model.test_families import ep, tp

ROWS = [[3, 80, 12, 5, 66, 41, 9, 9, 30], [7, 1], [50, 51, 52, 53]]

# (dense case, architecture that it becomes, options)
CASES = [
    ("llama", "MixtralForCausalLM", Upcycling(4, 2)),
    ("llama-mha-biases-llama3", None, Upcycling(4, 2)),  # no mixture of experts has biases in the MLP
    ("llama", "MixtralForCausalLM", Upcycling(8, 2, granularity=2, router_noise=0.5)),
    ("qwen3", "Qwen3MoeForCausalLM", Upcycling(8, 4, granularity=4, router_noise=0.02, seed=3)),
    ("qwen3", "Glm4MoeForCausalLM", Upcycling(9, 6, granularity=4, shared_experts=1, router_noise=0.1)),
    ("llama", "Glm4MoeForCausalLM", Upcycling(6, 2, granularity=3, shared_experts=2)),
    ("llama", "Glm4MoeForCausalLM", Upcycling(6, 3, granularity=3, router_noise=0.1)),
    ("qwen2", "Glm4MoeForCausalLM", Upcycling(4, 2, router_noise=0.01)),
]


@pytest.fixture(scope="module")
def pool():
    with RankPool(2, timeout=120) as made:
        yield made


def upcycle(rank, dense, options, output, to_hugging_face):
    model = UpcycledModel(open_checkpoint(dense, "--checkpoint"), options, "--checkpoint")
    (write_hugging_face if to_hugging_face else write_megatron)(model, Path(output))
    return model.family.architecture


def export(rank, checkpoint, output):
    write_hugging_face(MegatronCheckpoint(Path(checkpoint) / "iter_0000000", "--checkpoint"), Path(output))


@pytest.mark.parametrize("dense, architecture, options", CASES, ids=str)
def test_same_function(dense, architecture, options, tmp_path, pool):
    hf, moe, out = tmp_path / "hf", tmp_path / "moe", tmp_path / "out"
    _families.make(dense, hf)
    if architecture is None:
        with pytest.raises(ConfigError, match="no supported Hugging Face architecture"):
            UpcycledModel(open_checkpoint(hf, "--checkpoint"), options, "--checkpoint")
        return
    expected = _families.reference_logits(hf, ROWS, torch.float64)
    assert pool.run(upcycle, hf, options, moe, False) == [architecture] * 2
    layout = tp(2) | ep(2) if options.num_experts % 2 == 0 else tp(2)
    for result in pool.run(_running.logits, moe, layout, "float64", ROWS):
        for row, (positions, values) in result[0].items():
            # Routing weights are float32 in part, so 1/k is not exact.
            assert (values - expected[row][positions]).abs().max() < 5e-6
    pool.run(export, moe, out)
    for found, wanted in zip(_families.reference_logits(out, ROWS, torch.float64), expected):
        assert (found - wanted).abs().max() < 5e-6


def test_from_either_format_to_either_format(tmp_path, pool):
    """The format of the dense model does not change the mixture of experts; config.json is written too."""
    options = Upcycling(4, 2, granularity=2, router_noise=0.1)
    hf, megatron = tmp_path / "hf", tmp_path / "megatron"
    _families.make("qwen3", hf, torch.bfloat16)
    pool.run(upcycle_nothing, hf, megatron)
    pool.run(upcycle, hf, options, tmp_path / "a", True)
    pool.run(upcycle, megatron, options, tmp_path / "b", False)
    pool.run(export, tmp_path / "b", tmp_path / "c")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ac"]
    assert files[0] == files[1]
    assert (tmp_path / "a" / "config.json").exists()


def upcycle_nothing(rank, hf, output):
    write_megatron(open_checkpoint(hf, "--hf"), Path(output))


@pytest.mark.parametrize(
    "options, message",
    [
        (Upcycling(4, 2, granularity=5), "--granularity: 5 does not divide the MLP's 48 channels"),
        (Upcycling(4, 2, granularity=2, shared_experts=2), "--shared-experts: 2 must be below"),
        (Upcycling(5, 2, granularity=2), "--num-experts: 5 is not a multiple of 2"),
        (Upcycling(4, 3, granularity=2), "--topk: 3 is not a multiple of 2"),
        (Upcycling(4, 6), "--topk: 6 is not in"),
        (Upcycling(4, 1), "--topk: 1 is not in"),
        (Upcycling(4, 2, router_noise=-1.0), "--router-noise: -1.0"),
        (Upcycling(8, 2, granularity=2), "--router-noise: must be above 0"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        options.check(48)


def test_a_mixture_is_not_upcycled_again(tmp_path):
    _families.make("mixtral", tmp_path / "hf")
    with pytest.raises(ConfigError, match="already"):
        UpcycledModel(open_checkpoint(tmp_path / "hf", "--checkpoint"), Upcycling(4, 2), "--checkpoint")
