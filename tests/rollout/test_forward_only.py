"""Forward-only layers, which skip what only a backward pass needs, compute the same as megatron-core's."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_mopd.backend.packed_weights import PackedWeights
from megatron_mopd.model.norm import RMSNorm
from megatron_mopd.rollout.forward_only import forward_only, is_plain_linear
from tests import _models
from tests._distributed import run_ranks
from tests.rollout import _engines

BIASED = _models.DENSE | dict(add_bias_linear=True, add_qkv_bias=True)
GELU = _models.DENSE | dict(gated_linear_unit=False)


def chunk_of(transformer: dict) -> torch.nn.Module:
    _, (chunk,) = _engines.engine(transformer)
    chunk.eval()
    for name, parameter in chunk.named_parameters():
        if parameter.dim() == 1:  # norms and biases with an effect
            generator = torch.Generator().manual_seed(len(name))
            parameter.data += torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
    return chunk


def compare(rank, transformer):
    """Kind of replaced module -> (count, largest difference between its outputs for one input), and the same
    for the whole model."""
    chunk, found = chunk_of(transformer), {}
    tokens = torch.arange(12).view(2, 6)
    positions = torch.arange(6).unsqueeze(0)
    inputs, replaced = {}, []

    def keep(module, args, kwargs, output):
        inputs[module] = _copies(args), _copies(kwargs)

    hooks = [m.register_forward_hook(keep, with_kwargs=True) for m in chunk.modules()]
    with torch.no_grad():
        expected = chunk(tokens, positions, None)
        for hook in hooks:
            hook.remove()
        for module in chunk.modules():
            forward = forward_only(module, PackedWeights())
            if forward is None or module not in inputs:
                continue
            args, kwargs = inputs[module]
            stock = _first(module(*_copies(args), **_copies(kwargs)))
            difference = float((_first(forward(*_copies(args), **_copies(kwargs))) - stock).abs().max())
            kind = "linear" if is_plain_linear(module) else type(module).__name__
            count, worst = found.get(kind, (0, 0.0))
            found[kind] = count + 1, max(worst, difference)
            replaced.append((module, forward))
        for module, forward in replaced:
            module.forward = forward
        found["model"] = 1, float((chunk(tokens, positions, None) - expected).abs().max())
    return found


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _copies(values):
    """Copies of arguments, because forward passes may write to them."""
    if isinstance(values, dict):
        return {key: value.clone() if torch.is_tensor(value) else value for key, value in values.items()}
    return [value.clone() if torch.is_tensor(value) else value for value in values]


@pytest.mark.parametrize(
    "transformer, kinds",
    [
        (_models.GQA, {"linear": 16, "RMSNorm": 17, "MLP": 4, "TransformerLayer": 4}),
        (BIASED, {"linear": 16, "RMSNorm": 9, "TransformerLayer": 4}),
        (GELU, {"linear": 16, "RMSNorm": 9, "TransformerLayer": 4}),
    ],
    ids=["swiglu", "biases", "gelu"],
)
def test_dense_layers(transformer, kinds):
    (found,) = run_ranks(1, compare, transformer)
    assert {kind: count for kind, (count, _) in found.items() if kind != "model"} == kinds
    # float64 and activations of about 1: the outputs differ by a few roundings.
    assert max(difference for _, difference in found.values()) < 1e-12


@pytest.mark.parametrize("transformer", [_models.MOE, _models.SHARED], ids=["experts", "shared"])
def test_experts(transformer):
    (found,) = run_ranks(1, compare, transformer)
    assert found["MLP"][0] > 8  # experts are gated MLPs too, scaled by the router
    assert max(difference for _, difference in found.values()) < 1e-12


def left_alone(rank):
    chunk = chunk_of(_models.GQA)
    layer = chunk.decoder.layers[0]
    assert type(layer) is TransformerLayer and type(layer.mlp) is MLP

    class Other(MLP):
        """May compute something else."""

    weights, results = PackedWeights(), {}
    results["mlp"] = forward_only(layer.mlp, weights) is not None
    for name, value in (("activation_func_clamp_value", 7.0), ("glu_linear_offset", 1.0)):
        before = getattr(layer.config, name)
        setattr(layer.config, name, value)
        results[name] = forward_only(layer.mlp, weights) is not None
        setattr(layer.config, name, before)
    layer.mlp.__class__ = Other
    results["subclass"] = forward_only(layer.mlp, weights) is not None
    layer.config.fp32_residual_connection = True
    results["fp32 residual"] = forward_only(layer, weights) is not None
    results["norm on another device"] = forward_only(RMSNorm(layer.config, 8).to("meta"), weights) is not None
    results["no parameters"] = forward_only(torch.nn.Identity(), weights) is not None
    return results


def test_what_may_compute_something_else_is_left_alone():
    (results,) = run_ranks(1, left_alone)
    assert [name for name, replaced in results.items() if replaced] == ["mlp"]


def test_norm_in_bfloat16_keeps_float32_statistics():
    config = type("Config", (), dict(params_dtype=torch.bfloat16, sequence_parallel=False))
    norm = RMSNorm(config, 512)
    x = (1e3 * torch.randn(4, 512, generator=torch.Generator().manual_seed(1))).bfloat16()
    with torch.no_grad():
        assert torch.equal(forward_only(norm, PackedWeights())(x), norm(x))
