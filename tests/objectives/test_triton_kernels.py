"""The Triton path: equal to PyTorch's in the interpreter, compiled for Hopper, run on a GPU if present."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_mopd.objectives import linear_kl
from megatron_mopd.objectives.kernels import kernels_for
from tests.objectives import oracle
from tests.objectives.cases import Case, build

# On Linux, Triton is part of the test requirements, and its absence is an error.
needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")
HERE = Path(__file__).parent


@cache
def results_of(script):
    """The JSON on the last line that `script` prints in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(HERE / script)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_interpreted_kernels_equal_the_pytorch_path():
    results = results_of("interpreted_triton.py")
    assert len(results) > 30
    assert {name: result for name, result in results.items() if result != "ok"} == {}


@needs_triton
@pytest.mark.parametrize("kernel", ["statistics", "mean_score", "reverse_kl", "forward_kl", "jsd"])
def test_every_configuration_compiles_for_hopper(kernel):
    """With 128-bit loads of both logits blocks and without spilling registers."""
    configurations = results_of("compiled_triton.py")[kernel]
    assert len(configurations) >= 5
    for block, warps, wide_loads, local_accesses in configurations:
        assert wide_loads >= 2, f"block {block}, {warps} warps"
        assert local_accesses == 0, f"block {block}, {warps} warps"


def test_the_cpu_takes_the_pytorch_path():
    assert kernels_for(torch.device("cpu")).__name__.endswith("torch_kernels")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)]
)
def test_on_a_gpu(kind, dtype, tolerance):
    case = Case(
        tokens=40, student_width=64, teacher_widths=(32,), vocab_size=5003, divergence=kind, dtype=dtype
    )
    case = case.but(chunk_size=16, logit_scale=0.2)
    inputs = build(case)
    hidden, weight = inputs.hidden.cuda().requires_grad_(), inputs.weight.cuda().requires_grad_()
    loss, per_token = linear_kl(
        hidden,
        weight,
        inputs.teacher_hiddens[0].cuda(),
        inputs.teacher_weights[0].cuda(),
        token_weight=inputs.token_weight.cuda(),
        divergence=kind,
        vocab_size=case.vocab_size,
        chunk_size=case.chunk_size,
    )
    loss.backward()
    expected = oracle.linear_divergence(case, inputs)[1:]
    for got, want in zip((per_token, hidden.grad, weight.grad), expected):
        assert (got.cpu().double() - want).norm() <= tolerance * want.norm()
