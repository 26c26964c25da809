"""Products with weights packed into panels equal the plain ones, and are used only where they are faster."""

import pytest
import torch
import torch.nn.functional as F

from megatron_mopd.backend.packed_weights import PackedWeights


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request, monkeypatch):
    """Fake the number of threads, because two real ones in this process would break the ranks it forks."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("outputs", [640, 700])  # whole panels, and a remainder
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 32, 128, 129])
def test_products_equal_plain_ones(rows, bias, outputs, dtype, atol):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.nn.Parameter(torch.randn(outputs, 500, generator=generator, dtype=dtype))
    x = torch.randn(1, rows, 500, generator=generator, dtype=dtype)
    added = torch.randn(outputs, generator=generator, dtype=dtype) if bias else None
    weights = PackedWeights([weight])
    assert len(weights) == 1
    with torch.no_grad():
        found = weights.linear(x, weight, added)
        # Non-contiguous rows, as after a transposition.
        apart = weights.linear(x.transpose(0, 1).contiguous().transpose(0, 1), weight, added)
    exact = F.linear(x.double(), weight.double(), added.double() if bias else None)
    # 500 products of size 1: rounding of at most a few 1e-6 each; a wrong panel is off by 20.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=atol)
    torch.testing.assert_close(apart.double(), exact, rtol=0, atol=atol)
    assert found.shape == (1, rows, outputs) and found.dtype == dtype and not found.requires_grad


@pytest.mark.usefixtures("threads")
def test_the_packed_copy_is_what_is_multiplied():
    """The packed copy does not follow the weight, so results show which of the two was read."""
    weight, x = torch.ones(600, 500), torch.ones(129, 500)
    weights = PackedWeights([weight])
    weight.zero_()
    assert weights.linear(x[:128], weight).eq(500).all()
    assert weights.linear(x[:4], weight).eq(500).all()
    assert weights.linear(x, weight).eq(0).all()  # more rows than a decoding step has
    assert weights.linear(x[:3], weight).eq(0).all()  # so few rows that the plain product is as fast
    assert weights.linear(x[:0], weight).shape == (0, 600)
    assert weights.linear(x[:4], weight.clone()).eq(0).all()  # a weight that was not packed


def test_what_is_not_packed():
    large, small = torch.ones(600, 500), torch.ones(500, 500)
    assert len(PackedWeights([small, large.bfloat16(), large.half(), large.to("meta")])) == 0
    with torch.no_grad():
        assert PackedWeights([small]).linear(torch.ones(4, 500), small).eq(500).all()
