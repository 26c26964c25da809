"""Values and gradients of linear_cross_entropy and sampled_token_logprobs against fp64 log-softmax."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mopd.objectives import linear_cross_entropy, sampled_token_logprobs
from tests.objectives.cases import Case, assert_matches, build, shard, tp_group

TP = [1, 2, 4]


def token_ids(case):
    return torch.randint(case.vocab_size, (case.tokens,), generator=torch.Generator().manual_seed(case.seed))


def run_cross_entropy(rank, case, reduce_hidden_grad=True):
    inputs = build(case)
    hidden, weight = inputs.hidden.requires_grad_(), shard(inputs.weight, rank).requires_grad_()
    loss, per_token = linear_cross_entropy(
        hidden,
        weight,
        token_ids(case),
        token_weight=inputs.token_weight,
        group=tp_group(),
        vocab_size=case.vocab_size,
        chunk_size=case.chunk_size,
        reduce_hidden_grad=reduce_hidden_grad,
    )
    (2.5 * loss).backward()
    return loss.detach(), per_token, hidden.grad, weight.grad


def run_logprobs(rank, case, reduce_hidden_grad=True):
    inputs = build(case)
    hidden, weight = inputs.hidden.requires_grad_(), shard(inputs.weight, rank).requires_grad_()
    logprobs = sampled_token_logprobs(
        hidden,
        weight,
        token_ids(case),
        group=tp_group(),
        temperature=case.temperature,
        vocab_size=case.vocab_size,
        chunk_size=case.chunk_size,
        reduce_hidden_grad=reduce_hidden_grad,
    )
    loss = (inputs.token_weight.to(logprobs.dtype) * logprobs).sum()
    (2.5 * loss).backward()
    return loss.detach(), logprobs.detach(), hidden.grad, weight.grad


def expect(case, sign):
    inputs = build(case)
    hidden, weight = inputs.hidden.double().requires_grad_(), inputs.weight.double().requires_grad_()
    logits = (hidden @ weight.t())[:, : case.vocab_size] / case.temperature
    per_token = sign * logits.log_softmax(-1).gather(1, token_ids(case)[:, None]).squeeze(1)
    loss = (inputs.token_weight.double() * per_token).sum()
    (2.5 * loss).backward()
    return loss.detach(), per_token.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize(
    "options",
    [{}, {"tokens": 1}, {"vocab_size": 5}, {"tokens": 9, "chunk_size": 50}, {"logit_scale": 30.0}],
    ids=str,
)
def test_against_the_oracle(ranks, tp, options):
    case = Case(**options)
    assert_matches(ranks(tp, run_cross_entropy, case), expect(case, -1))
    case = case.but(temperature=1.6)
    assert_matches(ranks(tp, run_logprobs, case), expect(case, 1))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tp=st.sampled_from(TP),
    tokens=st.integers(0, 9),
    student_width=st.integers(1, 9),
    vocab_size=st.integers(1, 50),
    temperature=st.floats(0.3, 3.0),
    chunk_size=st.integers(1, 10),
    seed=st.integers(0, 10**6),
)
def test_any_shape(ranks, tp, **options):
    case = Case(**options)
    assert_matches(ranks(tp, run_logprobs, case), expect(case, 1), rtol=1e-8, atol=1e-8)
    case = case.but(temperature=1.0)
    assert_matches(ranks(tp, run_cross_entropy, case), expect(case, -1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_low_precision(ranks, dtype, tolerance):
    case = Case(tokens=40, student_width=16, vocab_size=57, dtype=dtype, chunk_size=16)
    for run, sign in ((run_cross_entropy, -1), (run_logprobs, 1)):
        results = ranks(2, run, case)
        expected = expect(case, sign)
        assert results[0][1].dtype == torch.float32 and results[0][2].dtype == dtype
        actual = [*results[0][1:3], torch.cat([result[3] for result in results])]
        for got, want in zip(actual, expected[1:]):
            assert (got.double() - want).norm() <= tolerance * want.norm()


def test_confident_tokens_keep_their_gradient_in_bf16(ranks):
    """p - 1 at p = 0.9995 is lost if p is rounded to bf16 first."""
    (gradient,) = ranks(1, _confident)
    assert -6e-4 < float(gradient[0, 0]) < -4e-4


def _confident(rank):
    hidden = torch.eye(1, dtype=torch.bfloat16)
    weight = torch.tensor([[7.625], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([0]), token_weight=torch.ones(1))
    loss.backward()
    return weight.grad.float()


def test_gradcheck(ranks):
    assert ranks(1, _gradcheck) == [True]


def _gradcheck(rank):
    case = Case(temperature=1.0)
    inputs, ids = build(case), token_ids(case)
    arguments = (inputs.hidden.requires_grad_(), inputs.weight.requires_grad_())

    def loss(hidden, weight):
        return linear_cross_entropy(
            hidden, weight, ids, token_weight=inputs.token_weight, vocab_size=case.vocab_size, chunk_size=2
        )[0]

    def logprobs(hidden, weight):
        return sampled_token_logprobs(
            hidden, weight, ids, temperature=1.3, vocab_size=case.vocab_size, chunk_size=2
        )

    return torch.autograd.gradcheck(loss, arguments) and torch.autograd.gradcheck(logprobs, arguments)


def test_ignored_targets_need_no_valid_id(ranks):
    """Prompt and padding positions have weight 0 and, by convention, target -100."""
    per_token, hidden_grad = ranks(1, _ignored)[0]
    assert per_token[1] == 0 and (hidden_grad[1] == 0).all() and (hidden_grad[0] != 0).any()


def _ignored(rank):
    inputs = build(Case(tokens=2))
    hidden = inputs.hidden.requires_grad_()
    loss, per_token = linear_cross_entropy(
        hidden, inputs.weight, torch.tensor([3, -100]), token_weight=torch.tensor([1.0, 0.0]), vocab_size=29
    )
    loss.backward()
    return per_token, hidden.grad


@pytest.mark.parametrize("run, sign", [(run_cross_entropy, -1), (run_logprobs, 1)])
def test_partial_hidden_gradients_add_up(ranks, run, sign):
    """With reduce_hidden_grad=False each rank keeps its partial gradient for the caller's reduce-scatter."""
    case = Case()
    parts = [result[2] for result in ranks(2, run, case, False)]
    expected = expect(case, sign)[2]
    torch.testing.assert_close(sum(parts), expected)
    assert not torch.allclose(parts[0], expected)
