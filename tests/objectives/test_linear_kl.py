"""linear_kl against the fp64 oracle: loss and both gradients, at TP 1, 2 and 4."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mopd.objectives import linear_kl
from tests.objectives import oracle
from tests.objectives.cases import Case, assert_matches, build, run_linear_kl, shard, tp_group

KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
TP = [1, 2, 4]


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.7, "logit_scale": 3.0},
        {"tokens": 1},
        {"tokens": 9, "chunk_size": 100},
        {"vocab_size": 5},  # at TP 4 whole shards are padding
        {"top_k": 4},
        {"top_k": 4, "top_k_from": "student", "temperature": 0.6},
        {"top_k": 1},
        {"top_k": 1000},  # more than the vocabulary: the full divergence
    ],
    ids=str,
)
def test_loss_and_gradients(ranks, tp, kind, beta, options):
    case = Case(divergence=kind, beta=beta, **options)
    assert_matches(ranks(tp, run_linear_kl, case), oracle.linear_divergence(case, build(case)))


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("mixture", [None, "shared", "per token"])
def test_several_teachers(ranks, tp, mixture):
    case = Case(teacher_widths=(5, 3, 8), mixture=mixture, temperature=1.3)
    inputs = build(case)
    if mixture is None:  # equal shares
        inputs = inputs._replace(mixture_weight=torch.full((3,), 1 / 3))
    assert_matches(
        ranks(tp, run_linear_kl, case), oracle.linear_divergence(case, inputs), rtol=1e-7, atol=1e-7
    )


def test_a_single_teacher_may_have_a_weight(ranks):
    case = Case(mixture="per token")
    assert_matches(ranks(2, run_linear_kl, case), oracle.linear_divergence(case, build(case)))


def test_beta_at_its_ends_means_the_limits(ranks):
    """GKD's convention (arXiv 2306.13649): beta 0 is forward KL, beta 1 is reverse KL."""
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        case = Case(divergence="jsd", beta=beta)
        assert_matches(
            ranks(2, run_linear_kl, case), oracle.linear_divergence(case.but(divergence=kind), build(case))
        )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tp=st.sampled_from(TP),
    kind=st.sampled_from(KINDS),
    tokens=st.integers(0, 9),
    student_width=st.integers(1, 9),
    teacher_widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    vocab_size=st.integers(1, 50),
    temperature=st.floats(0.3, 3.0),
    chunk_size=st.integers(1, 10),
    top_k=st.none() | st.integers(1, 60),
    top_k_from=st.sampled_from(["teacher", "student"]),
    logit_scale=st.sampled_from([0.01, 1.0, 10.0]),
    seed=st.integers(0, 10**6),
)
def test_any_shape_and_option(ranks, tp, kind, **options):
    case = Case(divergence=kind[0], beta=kind[1], **options)
    if len(case.teacher_widths) > 1:
        case = case.but(divergence="reverse_kl", top_k=None, mixture="per token")
    case = case.but(teacher_widths=tuple(case.teacher_widths))
    expected = oracle.linear_divergence(case, build(case))
    scale = max(1.0, *(float(x.abs().max()) for x in expected if x.numel()))
    tolerance = 1e-6 if len(case.teacher_widths) > 1 else 1e-8
    assert_matches(ranks(tp, run_linear_kl, case), expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_low_precision_inputs(ranks, dtype, tolerance, kind):
    """Statistics are fp32, so only logits and their gradients are rounded to the dtype."""
    for options in ({}, {"top_k": 4}):
        case = Case(
            tokens=40, student_width=16, teacher_widths=(12,), vocab_size=57, dtype=dtype, chunk_size=16
        )
        case = case.but(divergence=kind, **options)
        results = ranks(2, run_linear_kl, case)
        expected = oracle.linear_divergence(case, build(case))
        assert results[0][0].dtype == results[0][1].dtype == torch.float32
        assert results[0][2].dtype == results[0][3].dtype == dtype
        loss, *actual = *results[0][:3], torch.cat([result[3] for result in results])
        torch.testing.assert_close(loss, (build(case).token_weight.float() * actual[0]).sum())
        for got, want in zip(actual, expected[1:]):
            assert (got.double() - want).norm() <= tolerance * want.norm()


def test_low_precision_mixture(ranks):
    case = Case(tokens=20, teacher_widths=(12, 9), vocab_size=57, dtype=torch.bfloat16, mixture="shared")
    results = ranks(2, run_linear_kl, case)
    expected = oracle.linear_divergence(case, build(case))
    for got, want in zip([*results[0][:3], torch.cat([r[3] for r in results])], expected):
        assert (got.double() - want).norm() <= 0.03 * want.norm()


def test_fp16_gradient_survives_token_weights_of_one_over_n(ranks):
    """Weights of 1e-7 would underflow in fp16 before any loss scale is applied if not factored out."""
    case = Case(tokens=20, vocab_size=57, dtype=torch.float16)
    hidden_grad = ranks(1, _with_tiny_weights, case)[0]
    expected = oracle.linear_divergence(case, build(case))[2]
    assert (hidden_grad.double() - expected).norm() <= 5e-3 * expected.norm()


def _with_tiny_weights(rank, case):
    inputs = build(case)
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    loss, _ = linear_kl(
        hidden,
        weight,
        inputs.teacher_hiddens[0],
        inputs.teacher_weights[0],
        token_weight=inputs.token_weight * 1e-7,
        vocab_size=case.vocab_size,
    )
    (loss * 1e7).backward()
    return hidden.grad


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_identical_models_give_exactly_zero(ranks, tp, kind, beta, dtype):
    for top_k in (None, 4):
        case = Case(tokens=20, vocab_size=57, divergence=kind, beta=beta, dtype=dtype, top_k=top_k)
        for per_token, hidden_grad in ranks(tp, _identical, case):
            assert torch.equal(per_token, torch.zeros_like(per_token))
            assert hidden_grad.abs().max() < (1e-9 if dtype == torch.float64 else 1e-4)


def _identical(rank, case):
    inputs = build(case)
    hidden, weight = inputs.hidden.requires_grad_(), shard(inputs.weight, rank)
    loss, per_token = linear_kl(
        hidden,
        weight,
        hidden.detach().clone(),
        weight.clone(),
        token_weight=torch.ones(case.tokens),
        group=tp_group(),
        divergence=case.divergence,
        beta=case.beta,
        vocab_size=case.vocab_size,
        chunk_size=case.chunk_size,
        top_k=case.top_k,
    )
    loss.backward()
    return per_token, hidden.grad


@pytest.mark.parametrize("tp", TP)
def test_no_tokens(ranks, tp):
    """An empty micro-batch takes part in every collective and gives zero gradients, not None."""
    for options in ({}, {"top_k": 3}, {"teacher_widths": (5, 4)}, {"divergence": "jsd"}):
        for loss, per_token, hidden_grad, weight_grad in ranks(tp, run_linear_kl, Case(tokens=0, **options)):
            assert loss == 0 and per_token.shape == (0,)
            assert hidden_grad.shape == (0, 6)
            assert torch.equal(weight_grad, torch.zeros_like(weight_grad))


def test_upstream_gradient_scales_and_backward_repeats(ranks):
    case = Case()
    expected = oracle.linear_divergence(case, build(case))
    for result in ranks(2, run_linear_kl, case, -3.5):
        torch.testing.assert_close(result[2], -3.5 * expected[2])
    once, twice = ranks(1, _backward_twice, case)[0]
    torch.testing.assert_close(twice, 2 * once)


def _backward_twice(rank, case):
    inputs = build(case)
    hidden = inputs.hidden.requires_grad_()
    loss, _ = linear_kl(
        hidden,
        inputs.weight,
        inputs.teacher_hiddens,
        inputs.teacher_weights,
        token_weight=inputs.token_weight,
    )
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    return once, hidden.grad


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("kind, beta", KINDS)
def test_extreme_logits(ranks, tp, kind, beta):
    """Logits of about +-1e4, from hidden states and weights, in fp64 and fp32."""
    case = Case(divergence=kind, beta=beta, logit_scale=4e3, tokens=12)
    inputs = build(case)
    largest = (inputs.hidden @ inputs.weight[:29].t()).abs().max()
    assert 1e4 < largest < 5e4
    assert_matches(ranks(tp, run_linear_kl, case), oracle.linear_divergence(case, inputs), 1e-9, 1e-6)
    case = case.but(dtype=torch.float32)
    results = ranks(tp, run_linear_kl, case)
    expected = oracle.linear_divergence(case, build(case))
    actual = [*results[0][:3], torch.cat([result[3] for result in results])]
    # fp32 logits of this size, and so log-ratios, are accurate to 1e-3; the other factor scales their errors.
    spacing = torch.finfo(torch.float32).eps * largest
    for got, want, factor in zip(actual, expected, (10, 10, 10 * case.logit_scale, 10)):
        torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=float(factor * spacing))


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("kind, beta", [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5)])
def test_near_convergence(ranks, tp, top_k, kind, beta):
    """Per-token divergences of about 1e-7 in fp32, two heads on one hidden state: error far below 1e-3."""
    results = ranks(tp, _nearly_converged, top_k, kind, beta)
    for per_token, expected in results:
        assert (1e-8 if top_k is None else 1e-9) < expected.min() and expected.max() < 1e-6
        assert (per_token > 0).all()
        # Over k + 1 outcomes the divergence is a tenth of that, and the tail's mass is accurate to fp32 only.
        assert ((per_token.double() - expected) / expected).abs().max() < (1e-5 if top_k is None else 1e-3)


def _nearly_converged(rank, top_k, kind, beta):
    """Inputs are small integers over powers of two: products are exact, so only the divergence is rounded."""
    generator = torch.Generator().manual_seed(0)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).float()

    hidden, weight = integers(-8, 9, 6, 16) / 16, integers(-8, 9, 512, 16) / 8
    size = 2**-10 if kind == "jsd" else 2**-11
    moved = weight + integers(-1, 2, 512, 16) * size
    _, per_token = linear_kl(
        hidden,
        shard(weight, rank),
        hidden,
        shard(moved, rank),
        token_weight=torch.ones(6),
        group=tp_group(),
        divergence=kind,
        beta=beta,
        vocab_size=509,
        top_k=top_k,
    )
    log_p, log_q = oracle.log_softmaxes(hidden @ weight.t(), hidden @ moved.t(), vocab_size=509)
    if top_k is not None:
        log_p, log_q = oracle.truncate(log_p, log_q, top_k, "teacher")
    return per_token, oracle.divergence(log_p, log_q, kind, beta)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_gradcheck(ranks, kind):
    assert all(ranks(1, _gradcheck, Case(divergence=kind, beta=0.3, temperature=1.3)))
    assert all(ranks(1, _gradcheck, Case(divergence=kind, beta=0.3, top_k=4)))


def test_gradcheck_of_several_teachers(ranks):
    assert all(ranks(1, _gradcheck, Case(teacher_widths=(5, 3), mixture="per token", temperature=1.3)))


def _gradcheck(rank, case):
    inputs = build(case)

    def loss(hidden, weight):
        return linear_kl(
            hidden,
            weight,
            inputs.teacher_hiddens,
            inputs.teacher_weights,
            token_weight=inputs.token_weight,
            divergence=case.divergence,
            beta=case.beta,
            temperature=case.temperature,
            vocab_size=case.vocab_size,
            chunk_size=case.chunk_size,
            mixture_weight=inputs.mixture_weight,
            top_k=case.top_k,
        )[0]

    return torch.autograd.gradcheck(loss, (inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_the_gradients_asked_for(ranks, frozen):
    case = Case()
    expected = oracle.linear_divergence(case, build(case))
    for loss, hidden_grad, weight_grad in ranks(2, _frozen, case, frozen):
        torch.testing.assert_close(loss, expected[0])
        assert (hidden_grad is None) == (frozen in ("hidden", "both"))
        assert (weight_grad is None) == (frozen in ("weight", "both"))
        if hidden_grad is not None:
            torch.testing.assert_close(hidden_grad, expected[2])


def _frozen(rank, case, frozen):
    inputs = build(case)
    hidden = inputs.hidden.requires_grad_(frozen == "weight")
    weight = shard(inputs.weight, rank).requires_grad_(frozen == "hidden")
    loss, _ = linear_kl(
        hidden,
        weight,
        inputs.teacher_hiddens[0],
        shard(inputs.teacher_weights[0], rank),
        token_weight=inputs.token_weight,
        group=tp_group(),
        vocab_size=case.vocab_size,
    )
    if frozen != "both":
        loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def test_truncation_never_exceeds_the_full_divergence(ranks):
    case = Case(tokens=30)
    full = ranks(1, run_linear_kl, case)[0][1]
    previous = torch.zeros_like(full)
    for top_k in (1, 2, 5, 15, 28):
        truncated = ranks(1, run_linear_kl, case.but(top_k=top_k))[0][1]
        assert (truncated <= full + 1e-12).all() and (truncated >= previous - 1e-12).all()
        previous = truncated
