"""Rotary embedding: rounded like `transformers`, and the channels that it leaves unchanged."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_mopd.config import ConfigError
from megatron_mopd.model.families import FAMILIES
from megatron_mopd.model.rotary import RotaryAngles, rotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_is_that_of_transformers(dtype):
    generator = torch.Generator().manual_seed(1)
    heads = torch.randn(2, 3, 50, 16, generator=generator).to(dtype)  # [b, heads, s, d]
    positions = torch.arange(50).unsqueeze(0) + 900
    config = LlamaConfig(hidden_size=48, num_attention_heads=3, head_dim=16, rope_theta=5000.0)
    cosines, sines = LlamaRotaryEmbedding(config)(heads, positions)
    expected, _ = apply_rotary_pos_emb(heads, heads, cosines, sines)
    angles = RotaryAngles(16, 5000.0)(positions, dtype)
    assert torch.equal(rotate(heads.permute(2, 0, 1, 3), angles).permute(1, 2, 0, 3), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_by_their_angle_and_the_rest_passes(interleaved):
    """As complex numbers in float64: a pair (x, y) becomes (x + iy) times exp(i position frequency)."""
    x = torch.randn(7, 2, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(7).unsqueeze(0)
    found = rotate(x, RotaryAngles(8, 100.0)(positions, torch.float64), interleaved)
    pairs = x[..., :8].unflatten(-1, (4, 2)) if interleaved else x[..., :8].unflatten(-1, (2, 4)).mT
    frequencies = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angle = positions[0, :, None, None, None] * frequencies
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag, x[..., 8:]), dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # the angles themselves are float32
    assert torch.equal(found[0, ..., :4], pairs[0, ..., 0])  # position 0 has angle 0


_LINEAR = {"rope_type": "linear", "factor": 2.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def _read(rope):
    config = LlamaConfig(hidden_size=48, num_attention_heads=3, head_dim=16, rope_parameters=dict(rope))
    return config, FAMILIES["llama"].model_config(config, "student.load")


@pytest.mark.parametrize(
    "rope, extra",
    [
        (_LINEAR, {"original_max_position_embeddings": 64, "finetuned": True}),
        (_LINEAR, {"attn_factor": 1, "attention_factor": 1.0, "beta_fast": None}),
        (_YARN, {"finetuned": False, "attn_factor": 1.0, "extrapolation_factor": 1, "type": "yarn"}),
        ({"rope_type": "default"}, {"factor": 4.0, "type": "default", "original_max_position_embeddings": 9}),
        ({"rope_type": "default"}, {"beta_fast": 32, "low_freq_factor": 1.0, "attention_factor": 1.3}),
    ],
    ids=["linear", "linear-factors", "yarn", "default", "default-of-others"],
)
def test_keys_that_change_nothing_are_accepted(rope, extra):
    """Angles equal those of `transformers` for the same mapping and for the mapping without the keys."""
    config, model = _read(rope | extra)
    assert model == _read(rope)[1]
    positions = torch.arange(50).unsqueeze(0)
    cosines, sines = LlamaRotaryEmbedding(config)(torch.zeros(1, 50, 48), positions)
    found = RotaryAngles(16, model.rotary_base, model.rope_scaling)(positions, torch.float32)
    assert torch.equal(found[0, :, 0, 0], cosines[0])
    assert torch.equal(found[1, :, 0, 0, 8:], sines[0, :, 8:])


@pytest.mark.parametrize(
    "rope, extra",
    [
        (_YARN, {"attn_factor": 1.2}),
        (_LINEAR, {"attention_factor": 0.7}),
        (_LINEAR, {"mrope_section": [2, 3, 3]}),
        ({"rope_type": "default"}, {"mrope_section": [2, 3, 3]}),
        (_YARN, {"extrapolation_factor": True}),
    ],
)
def test_keys_that_may_change_the_result_are_refused_by_name(rope, extra):
    with pytest.raises(ConfigError, match=f"does not accept {next(iter(extra))}"):
        _read(rope | extra)
