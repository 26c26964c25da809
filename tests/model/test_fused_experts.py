"""Files with fused experts: one tensor for all experts of a layer, as transformers 5 holds them in memory."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.model import _families, _running
from tests.model.test_conversion import to_hugging_face, to_megatron
from tests.model.test_families import ROWS, difference, ep, pp, tp

LAYOUTS = [
    (1, "qwen3-moe-dense-layers-plain-topk", {}),
    (2, "qwen3-moe", ep(2)),
    (2, "qwen2-moe", tp(2) | ep(1, 2)),
    (4, "mixtral", tp(2) | ep(2, 2)),
    (2, "olmoe", tp(2) | ep(2)),
    (4, "deepseek-v3", pp(2) | ep(2)),
    (4, "glm4-moe", tp(2) | pp(2) | ep(1, 2)),
]


@pytest.mark.parametrize("ranks, case, layout", LAYOUTS, ids=str)
def test_same_logits_as_transformers(ranks, case, layout, tmp_path, pools):
    """[experts, gate then up, hidden], not transposed: every family, with TP, EP and ETP shards."""
    _families.make(case, tmp_path, save_original_format=False, max_shard_size="40KB")
    names = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert "model.layers.3.mlp.experts.gate_up_proj" in names and not any(".0.w1" in name for name in names)
    expected = _families.reference_logits(tmp_path, ROWS, torch.float32)
    results = pools(ranks).run(_running.logits, tmp_path, layout, "float32", ROWS)
    assert difference(results, expected) < 1e-4


@pytest.mark.parametrize("case", ["mixtral", "deepseek-v3"])
def test_goes_out_one_tensor_per_expert(case, tmp_path, pools):
    """Exports use the names of published checkpoints, which transformers, vLLM and SGLang read."""
    fused, usual, megatron, back = (tmp_path / name for name in ("fused", "usual", "megatron", "back"))
    _families.make(case, fused, save_original_format=False)
    _families.make(case, usual)
    pools(2).run(to_megatron, fused, megatron)
    pools(1).run(to_hugging_face, megatron, back)
    found, expected = (load_file(path / "model.safetensors") for path in (back, usual))
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    states = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (fused, back)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
