"""vocab_parallel_kl: value and gradient against the fp64 oracle, and the numerics of all divergences."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mopd.objectives import linear_kl, torch_kernels, vocab_parallel_kl
from megatron_mopd.objectives.definitions import DivergenceSpec
from megatron_mopd.objectives.divergence import merge_statistics
from megatron_mopd.objectives.vocab_shard import VocabShard
from tests.objectives import oracle
from tests.objectives.cases import shard, tp_group

KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.2)]
TP = [1, 2, 4]


def run(rank, student, teacher, vocab_size, kind, beta, temperature, upstream):
    """Value and this rank's gradient, given unsharded student and teacher logits [..., padded]; `upstream` is
    the gradient of the value."""
    local = shard(student.movedim(-1, 0), rank).movedim(0, -1).requires_grad_()
    value = vocab_parallel_kl(
        local,
        shard(teacher.movedim(-1, 0), rank).movedim(0, -1),
        group=tp_group(),
        divergence=kind,
        beta=beta,
        temperature=temperature,
        vocab_size=vocab_size,
    )
    value.backward(upstream.to(value.dtype))
    return value.detach(), local.grad


def check(ranks, tp, student, teacher, vocab_size, kind, beta, temperature=1.0, rtol=1e-9, atol=1e-10):
    upstream = torch.randn(student.shape[:-1], dtype=torch.float64)
    results = ranks(tp, run, student, teacher, vocab_size, kind, beta, temperature, upstream)
    whole = student.double().requires_grad_()
    finite = whole.clamp(min=-1e5), teacher.double().clamp(min=-1e5)  # 0 * inf is NaN in the oracle
    expected = oracle.divergence(*oracle.log_softmaxes(*finite, temperature, vocab_size), kind, beta)
    (gradient,) = torch.autograd.grad(expected, whole, upstream)
    for value, _ in results:
        assert value.shape == student.shape[:-1]
        assert (value >= 0).all()
        torch.testing.assert_close(value.double(), expected.detach(), rtol=rtol, atol=atol)
    joined = torch.cat([grad for _, grad in results], dim=-1).double()
    torch.testing.assert_close(joined, gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 20), (16,), (0, 12), (1, 4)], ids=str)
def test_value_and_gradient(ranks, tp, kind, beta, shape):
    torch.manual_seed(1)
    student, teacher = 3 * torch.randn(2, *shape, dtype=torch.float64)
    check(ranks, tp, student, teacher, max(1, shape[-1] - 3), kind, beta, temperature=1.4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tp=st.sampled_from(TP),
    kind=st.sampled_from(KINDS),
    tokens=st.integers(0, 6),
    columns=st.integers(1, 12),
    padding=st.integers(0, 3),
    temperature=st.floats(0.2, 4.0),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 10**6),
)
def test_any_shape(ranks, tp, kind, tokens, columns, padding, temperature, scale, seed):
    torch.manual_seed(seed)
    student, teacher = scale * torch.randn(2, tokens, 4 * columns, dtype=torch.float64)
    vocab_size = max(1, 4 * columns - padding)
    check(ranks, tp, student, teacher, vocab_size, *kind, temperature, rtol=1e-8, atol=1e-9 * max(1, scale))


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("kind, beta", KINDS)
def test_extreme_logits(ranks, tp, kind, beta):
    """Logits of +-1e4 overflow every exponential that is not taken relative to the maximum."""
    torch.manual_seed(2)
    student = torch.where(torch.rand(6, 16) < 0.5, -1e4, 1e4) + torch.randn(6, 16)
    teacher = torch.where(torch.rand(6, 16) < 0.5, -1e4, 1e4) + torch.randn(6, 16)
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-2)):
        check(ranks, tp, student.to(dtype), teacher.to(dtype), 15, kind, beta, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_never_negative_where_fp32_resolves_little(ranks, kind, beta):
    """At 1e6 the spacing of fp32 is 0.06: log-ratios and probabilities disagree, but values are >= 0."""
    torch.manual_seed(0)
    student = 1e6 + torch.randn(200, 64)
    teacher = student + 0.3 * torch.randn(200, 64)
    for value, _ in ranks(2, run, student, teacher, 64, kind, beta, 1.0, torch.ones(200)):
        assert (value >= 0).all()


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("kind, beta", KINDS)
def test_masked_tokens(ranks, tp, kind, beta):
    """-inf logits that the divergence's numerator also excludes; at TP 4 one shard is masked entirely."""
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 5, 16, dtype=torch.float64)
    both = torch.zeros(5, 16, dtype=torch.bool)
    both[:, 4:8] = both[2, 9] = True
    student[both] = teacher[both] = -torch.inf
    if kind == "jsd":  # finite whatever the supports
        student[0, 0] = teacher[1, 1] = -torch.inf
    elif kind == "reverse_kl":
        student[0, 0] = -torch.inf
    else:
        teacher[0, 0] = -torch.inf
    check(ranks, tp, student, teacher, 16, kind, beta)


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, beta", KINDS)
def test_identical_models_give_exactly_zero(ranks, tp, dtype, kind, beta):
    torch.manual_seed(4)
    student = (20 * torch.randn(8, 32)).to(dtype)
    for value, gradient in ranks(tp, run, student, student.clone(), 30, kind, beta, 1.3, torch.ones(8)):
        assert torch.equal(value, torch.zeros_like(value))
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("size", [1e-3, 3e-4, 1e-5])
def test_near_convergence(ranks, kind, beta, size):
    """Divergences of 1e-7 and below in fp32: relative error below 1e-3; the textbook form goes negative."""
    torch.manual_seed(5)
    student = 3 * torch.randn(16, 2048)
    teacher = student + size * torch.randn(16, 2048)
    upstream = torch.ones(16)
    results = ranks(2, run, student, teacher, 2048, kind, beta, 1.0, upstream)
    whole = student.double().requires_grad_()
    log_p, log_q = oracle.log_softmaxes(whole, teacher)
    d = log_q - log_p
    if kind == "jsd":  # to second order in d, the only relevant term here
        expected = 0.5 * beta * (1 - beta) * (log_p.exp() * d * d).sum(-1)
        expected = expected.detach()
    else:
        expected = oracle.divergence(log_p, log_q, kind).detach()
    assert expected.max() < 2e-6
    value = results[0][0].double()
    assert (value >= 0).all()
    assert ((value - expected) / expected).abs().max() < (2e-3 if kind == "jsd" else 1e-3)
    (gradient,) = torch.autograd.grad(oracle.divergence(log_p, log_q, kind, beta).sum(), whole)
    joined = torch.cat([grad for _, grad in results], dim=-1).double()
    # The rounding of the logits, about 1e-7 absolute, limits the accuracy of a gradient of size p d.
    assert (joined - gradient).norm() < max(1e-3, 3e-7 / size) * gradient.norm()
    assert joined.sum().abs() < max(1e-4, 1e-8 / size) * joined.abs().sum()


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_normalizers_near_convergence(kind):
    """The difference of the log normalizers is a hundred times more accurate than either of them in fp32,
    whatever the rounding of the processor's exponentials and sums."""
    torch.manual_seed(5)
    student = 3 * torch.randn(64, 2048)
    teacher = student + 1e-5 * torch.randn(64, 2048)
    spec, shard = DivergenceSpec(kind), VocabShard.of(2048, None, None)
    moments = merge_statistics(torch_kernels.statistics(student, teacher, spec), shard, spec)
    expected = student.double().logsumexp(-1) - teacher.double().logsumexp(-1)
    assert (moments.log_ratio_offset - expected).abs().max() < 1e-8


@pytest.mark.parametrize("kind, beta", KINDS)
def test_gradcheck(ranks, kind, beta):
    assert ranks(1, _gradcheck, kind, beta) == [True]


def _gradcheck(rank, kind, beta):
    torch.manual_seed(6)
    student, teacher = torch.randn(2, 3, 9, dtype=torch.float64)

    def value(logits):
        return vocab_parallel_kl(logits, teacher, divergence=kind, beta=beta, temperature=0.7, vocab_size=8)

    return torch.autograd.gradcheck(value, student.requires_grad_())


def test_any_memory_layout(ranks):
    """Transposed, strided and broadcast logits give the same results as contiguous ones."""
    assert ranks(1, _layouts) == [True]


def _layouts(rank):
    torch.manual_seed(7)
    student, teacher = torch.randn(2, 6, 4, 10, dtype=torch.float64)
    expected = vocab_parallel_kl(student, teacher)
    for layout in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
        lambda x: torch.cat([x, x], -1)[..., :10],
    ):
        local = layout(student).requires_grad_()
        value = vocab_parallel_kl(local, layout(teacher))
        torch.testing.assert_close(value.detach(), expected)
        value.sum().backward()
    row = vocab_parallel_kl(student[:1].expand(6, -1, -1), teacher[:1].expand(6, -1, -1))
    torch.testing.assert_close(row, expected[:1].expand(6, -1))
    return True


def test_agrees_with_linear_kl(ranks):
    """Both functions compute the same per-token values and weight gradients."""
    assert ranks(2, _agreement) == [True, True]


def _agreement(rank):
    torch.manual_seed(8)
    hidden, teacher_hidden = torch.randn(2, 9, 6, dtype=torch.float64)
    weight, teacher_weight = (shard(torch.randn(16, 6, dtype=torch.float64), rank) for _ in range(2))
    weight.requires_grad_()
    loss, per_token = linear_kl(
        hidden, weight, teacher_hidden, teacher_weight, token_weight=torch.ones(9), group=tp_group()
    )
    loss.backward()
    fused, weight.grad = weight.grad, None
    value = vocab_parallel_kl(hidden @ weight.t(), teacher_hidden @ teacher_weight.t(), group=tp_group())
    value.sum().backward()
    torch.testing.assert_close(per_token, value.detach())
    torch.testing.assert_close(fused, weight.grad)
    return True
