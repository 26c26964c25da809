"""Products with weights in oneDNN's layout equal the plain ones, and are used only where they can be."""

import pytest
import torch
import torch.nn.functional as F

from megatron_mopd.backend import packed_weights
from megatron_mopd.backend.packed_weights import PackedWeights


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 32, 64])
def test_products_equal_plain_ones(rows, bias):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.nn.Parameter(torch.randn(700, 500, generator=generator))
    x = torch.randn(1, rows, 500, generator=generator)
    added = torch.randn(700, generator=generator) if bias else None
    weights = PackedWeights([weight], rows=32)
    assert len(weights) == packed_weights._has_packed_products()
    with torch.no_grad():
        found = weights.linear(x, weight, added)
    exact = F.linear(x.double(), weight.double(), added.double() if bias else None)
    # 500 products of size 1: rounding of at most a few 1e-6 each; a wrong layout is off by 20.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    assert found.shape == (1, rows, 700) and not found.requires_grad


def test_the_packed_copy_is_what_is_multiplied():
    """It does not follow the weight, so results show which of the two was read."""
    if not packed_weights._has_packed_products():
        return  # this build of torch has plain products only
    weight, x = torch.ones(600, 500), torch.ones(65, 500)
    weights = PackedWeights([weight], rows=8)
    weight.zero_()
    assert weights.linear(x[:64], weight).eq(500).all()
    assert weights.linear(x, weight).eq(0).all()  # more rows than a decoding step has
    assert weights.linear(x[:0], weight).shape == (0, 600)
    assert weights.linear(x[:4], weight.clone()).eq(0).all()  # a weight that it does not know


def test_what_is_not_packed(monkeypatch):
    large, small = torch.ones(600, 500), torch.ones(500, 500)
    assert len(PackedWeights([small, large.double(), large.bfloat16(), large.to("meta")])) == 0
    with torch.no_grad():
        assert PackedWeights([small]).linear(torch.ones(2, 500), small).eq(500).all()
    monkeypatch.setattr(packed_weights, "_has_packed_products", lambda: False)
    weights = PackedWeights([large])
    assert len(weights) == 0 and weights.linear(torch.ones(2, 500), large).eq(500).all()
