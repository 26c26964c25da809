"""The hidden-state cache: contents, precision and size."""

import pytest
import torch

from megatron_mopd.teachers.hidden_cache import HiddenCache

CPU = torch.device("cpu")


@pytest.mark.parametrize("placement", ["host", "device"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_states_come_back_bit_by_bit_and_are_released(placement, dtype):
    cache = HiddenCache(CPU, placement)
    states = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    cache.put(3, "math", states)
    with torch.no_grad():
        expected = states.clone()
        states.zero_()  # the model reuses its buffer
    assert len(cache) == 1 and cache.peak_bytes == 40 * dtype.itemsize
    found = cache.pop(3, "math")
    assert torch.equal(found, expected) and not found.requires_grad
    assert len(cache) == 0
    with pytest.raises(KeyError):
        cache.pop(3, "math")


def test_fewer_bits_only_when_asked_for():
    states = torch.randn(5, 8)
    cache = HiddenCache(CPU, dtype="bfloat16")
    cache.put(0, "math", states)
    assert cache.peak_bytes == 80
    found = cache.pop(0, "math")
    assert found.dtype == torch.float32 and torch.equal(found, states.bfloat16().float())


def test_log_probs_live_beside_states_and_take_four_bytes_a_token():
    cache = HiddenCache(CPU, dtype="bfloat16")
    log_probs = torch.randn(7)
    cache.put_log_probs(0, "math", log_probs)
    assert cache.peak_bytes == 28
    cache.put(0, "math", torch.randn(7, 4))
    assert torch.equal(cache.pop_log_probs(0, "math"), log_probs)
    assert len(cache) == 1


def test_scoring_twice_is_a_bug_and_the_budget_is_kept():
    cache = HiddenCache(CPU, budget=100)
    cache.put(0, "math", torch.zeros(3, 8))
    with pytest.raises(AssertionError, match="scored twice"):
        cache.put(0, "math", torch.zeros(3, 8))
    with pytest.raises(RuntimeError, match="hidden_cache_bytes is 100"):
        cache.put(1, "math", torch.zeros(1, 8))
