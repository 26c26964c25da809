"""Compares the Triton kernels with the PyTorch path under Triton's interpreter, for `test_triton_kernels.py`.

The interpreter must be selected before Triton is first imported, which other tests may already have done:
hence a separate process. Prints one JSON object {check: "ok" or what differs}.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from megatron_mopd.objectives import torch_kernels, triton_kernels  # noqa: E402
from megatron_mopd.objectives.definitions import DIVERGENCES, DivergenceSpec  # noqa: E402
from megatron_mopd.objectives.divergence import merge_statistics  # noqa: E402
from megatron_mopd.objectives.vocab_shard import VocabShard  # noqa: E402

ROWS, COLUMNS = 4, 45  # three blocks of 16 columns, the last one partial
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def logits(dtype, noise, masked=None, rows=ROWS):
    """Student and teacher blocks [rows, COLUMNS], with a row stride above COLUMNS as in a padded buffer."""
    torch.manual_seed(0)
    student = 3 * torch.randn(rows, COLUMNS + 3, dtype=torch.float64)
    teacher = student + noise * torch.randn(rows, COLUMNS + 3, dtype=torch.float64)
    if masked is not None:  # a token that both models exclude, and one that only the numerator excludes
        student[0, 3] = teacher[0, 3] = -torch.inf
        (teacher if masked == "forward_kl" else student)[1, 20] = -torch.inf
    return student.to(dtype)[:, :COLUMNS], teacher.to(dtype)[:, :COLUMNS]


def compare(kind, dtype, temperature, noise, masked):
    """Run the three passes of both paths on the same blocks and compare the results."""
    spec = DivergenceSpec(kind, 0.3, temperature)
    rows = 2  # rows are interpreted one by one; these two contain all masked tokens
    student, teacher = logits(dtype, noise, kind if masked else None, rows)
    shard = VocabShard.of(COLUMNS, None, None)
    expected = torch_kernels.statistics(student, teacher, spec, masked, entropy=True)
    interpreted = triton_kernels.statistics(student, teacher, spec, masked, entropy=True)
    for got, want in zip(interpreted, expected):
        close(got, want, dtype, statistics=True)
    assert torch.equal(triton_kernels.statistics(student, teacher, spec, masked), interpreted[:5])
    moments = merge_statistics(expected, shard, spec)
    if kind == "jsd":
        score = torch_kernels.mean_score(student, teacher, moments, spec, masked)
        # Signed terms cancel here, so errors are relative to the terms and not to their sum.
        interpreted = triton_kernels.mean_score(student, teacher, moments, spec, masked)
        close(interpreted + 1e-3, score + 1e-3, dtype, statistics=True)
        moments = moments._replace(mean_score=score)
    scale = torch.randn(rows).to(score_dtype(dtype))
    gradients = []
    for kernels in (torch_kernels, triton_kernels):
        gradient = student.clone()
        value = kernels.divergence(gradient, teacher, moments, spec, scale, gradient, masked)  # in place
        gradients.append((value, gradient))
    close(gradients[1][0], gradients[0][0], dtype, statistics=True)
    close(gradients[1][1], gradients[0][1], dtype)
    value_alone = triton_kernels.divergence(student, teacher, moments, spec, masked=masked)
    assert torch.equal(value_alone, gradients[1][0]), "the value depends on whether the gradient is requested"


def score_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def close(actual, expected, dtype, statistics=False):
    """Statistics and values are fp32 whatever the logits' dtype; gradients are rounded to it."""
    tolerance = TOLERANCE[score_dtype(dtype) if statistics else dtype]
    assert actual.dtype == expected.dtype
    scale = expected.double().abs().max()
    error = (actual.double() - expected.double()).abs().max()
    assert error <= tolerance * scale, f"{float(error)} of {float(scale)}"


def identical_models_give_zero():
    student, _ = logits(torch.float32, 0.0)
    for kind in DIVERGENCES:
        spec = DivergenceSpec(kind)
        statistics = triton_kernels.statistics(student, student.clone(), spec)
        moments = merge_statistics(statistics, VocabShard.of(COLUMNS, None, None), spec)
        value = triton_kernels.divergence(student, student.clone(), moments, spec)
        assert torch.equal(value, torch.zeros_like(value)), kind


def nan_stays_visible():
    for kind in DIVERGENCES:
        for masked in (False, True):
            student, teacher = logits(torch.float32, 1.0)
            student[1, 7], teacher[2, 40] = torch.nan, torch.inf
            spec = DivergenceSpec(kind)
            statistics = triton_kernels.statistics(student, teacher, spec, masked)
            moments = merge_statistics(statistics, VocabShard.of(COLUMNS, None, None), spec)
            value = triton_kernels.divergence(student, teacher, moments, spec, masked=masked)
            assert torch.isfinite(value).tolist() == [True, False, False, True], (kind, masked, value)


class CountTraffic:
    """Counts the elements that the interpreted kernels load and store, without masked ones."""

    def __enter__(self):
        self.read = self.written = 0
        self._load, self._store = (
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
        )

        def load(builder, pointers, mask, *rest):
            self.read += int(mask.data.sum())
            return self._load(builder, pointers, mask, *rest)

        def store(builder, pointers, value, mask, *rest):
            self.written += int(mask.data.sum())
            return self._store(builder, pointers, value, mask, *rest)

        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        return self

    def __exit__(self, *exception):
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = (
            self._load,
            self._store,
        )


def traffic():
    """Two reads of both blocks and one write in total (JSD: one more read), plus a few scalars per row."""
    for kind in DIVERGENCES:
        spec = DivergenceSpec(kind)
        student, teacher = logits(torch.float32, 1.0)
        block = student.numel()
        with CountTraffic() as first:
            statistics = triton_kernels.statistics(student, teacher, spec, entropy=True)
        moments = merge_statistics(statistics, VocabShard.of(COLUMNS, None, None), spec)
        with CountTraffic() as extra:
            if kind == "jsd":
                triton_kernels.mean_score(student, teacher, moments, spec)
        with CountTraffic() as second:
            triton_kernels.divergence(student, teacher, moments, spec, torch.ones(ROWS), student)
        assert (first.read, first.written) == (2 * block, 7 * ROWS), (first.read, first.written)
        assert extra.read == (2 * block + 2 * ROWS if kind == "jsd" else 0), extra.read
        assert (second.read, second.written) == (2 * block + 5 * ROWS, block + ROWS), kind


def empty_blocks():
    spec = DivergenceSpec("jsd")
    for rows, columns in ((0, 5), (3, 0)):
        block = torch.empty(rows, columns)
        statistics = triton_kernels.statistics(block, block, spec)
        assert torch.equal(statistics, torch_kernels.statistics(block, block, spec))
        moments = merge_statistics(
            torch.ones(5, rows), VocabShard(None, 0, 1, columns, columns, columns), spec
        )
        for function in (triton_kernels.mean_score, triton_kernels.divergence):
            assert torch.equal(function(block, block, moments, spec), torch.zeros(rows))


def checks():
    for kind in DIVERGENCES:
        for dtype in TOLERANCE:
            yield f"{kind} {dtype}", lambda kind=kind, dtype=dtype: compare(kind, dtype, 1.0, 2.0, False)
        for dtype in (torch.float64, torch.float32):
            yield f"{kind} {dtype} temperature", lambda k=kind, t=dtype: compare(k, t, 1.7, 2.0, False)
            yield f"{kind} {dtype} near convergence", lambda k=kind, t=dtype: compare(k, t, 1.0, 1e-3, False)
            yield f"{kind} {dtype} masked", lambda k=kind, t=dtype: compare(k, t, 1.0, 2.0, True)
    yield "identical models", identical_models_give_zero
    yield "nan", nan_stays_visible
    yield "empty blocks", empty_blocks
    yield "memory traffic", traffic


def main():
    results = {}
    for name, check in checks():
        try:
            check()
            results[name] = "ok"
        except Exception as error:  # reported by the calling test
            results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    main()
