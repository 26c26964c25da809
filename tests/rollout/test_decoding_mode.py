"""Decoding restores the training model's state, even after an error."""

import pytest
import torch

from megatron_mopd.rollout.decoding_mode import decoding_mode
from tests import _models
from tests._distributed import run_ranks
from tests.rollout import _engines

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def state(chunks) -> dict:
    """Every attribute of the model's modules that concerns sequence scattering, and every training flag."""
    found = {}
    for name, module in chunks[0].named_modules():
        found[name, "training"] = module.training
        for key, value in vars(module).items():
            if isinstance(value, bool) and ("sequence_parallel" in key or "scatter" in key):
                found[name, key] = value
        for key in ("config", "token_dispatcher"):
            if hasattr(getattr(module, key, None), "__dict__"):
                holder = getattr(module, key)
                holder = getattr(holder, "config", holder)
                found[name, key] = holder.sequence_parallel
        found[name, "product"] = "forward" in vars(module)
    return found


def enter_and_fail(rank):
    _, chunks = _engines.engine(_models.SHARED, SP)
    frozen = chunks[0].decoder.layers[0].self_attention
    frozen.eval()  # a module that was in evaluation mode stays in it
    before = state(chunks)
    with pytest.raises(KeyError), decoding_mode(chunks):
        inside, gradients = state(chunks), torch.is_grad_enabled()
        raise KeyError("a failure in the middle of a rollout")
    return before, inside, state(chunks), gradients, torch.is_grad_enabled()


def test_switched_off_everywhere_and_restored_after_an_exception():
    for before, inside, after, gradients_inside, gradients_after in run_ranks(2, enter_and_fail):
        switches = [key for key, value in before.items() if value and key[1] != "training"]
        # The configuration, all tensor-parallel linears and the embedding have flags to switch off.
        assert len(switches) > 20 and any("embedding" in name for name, _ in switches)
        assert not any(value for (_, key), value in inside.items() if key != "product")
        # Every linear layer of the attention, experts and shared experts skips its autograd function.
        assert sum(inside[key] for key in inside if key[1] == "product") > 20
        assert not any(before[key] for key in before if key[1] == "product")
        assert after == before
        assert before["decoder.layers.0.self_attention", "training"] is False
        assert before["decoder.layers.1.self_attention", "training"] is True
        assert gradients_inside is False and gradients_after is True


def fail_in_a_forward(rank):
    engine, chunks = _engines.engine(_models.MOE, SP)
    before = state(chunks)
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("broken layer")

    hook = chunks[0].decoder.layers[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        engine.generate(_engines.prompts(), _engines.sampling(), seed=1)
    hook.remove()
    restored = state(chunks) == before
    # The model still works: sampling, then a training forward pass whose sequence is scattered.
    engine.generate(_engines.prompts(), _engines.sampling(), seed=1)
    tokens = torch.arange(8).unsqueeze(0)
    hidden = chunks[0](tokens, tokens, None)
    hidden.sum().backward()
    return restored, tuple(hidden.shape), state(chunks) == before, chunks[0].head_weight().requires_grad


def test_a_failing_rollout_leaves_a_model_that_trains():
    for result in run_ranks(2, fail_in_a_forward):
        assert result == (True, (4, 1, 32), True, True)
