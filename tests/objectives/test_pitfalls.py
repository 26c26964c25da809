"""Gradient bugs that shipped elsewhere, reproduced one by one: each fails the check that our code passes."""

import pytest
import torch
import torch.distributed as dist

from megatron_mopd.objectives import linear_kl, sampled_token_logprobs, vocab_parallel_kl
from tests.objectives import oracle
from tests.objectives.cases import shard, tp_group

TEMPERATURE, VOCAB = 1.5, 14


class SumReplicated(torch.autograd.Function):
    """All-reduce of a value that every rank uses identically (a final loss): the gradient passes through."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x := x.clone())
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class SumShared(SumReplicated):
    """All-reduce of a value that each rank uses in its own columns (a normalizer): gradients are summed."""

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad := grad.clone())
        return grad


def plain_all_reduce(x):
    """An all-reduce hidden from autograd: the value is right, but other ranks' gradients are missing."""
    total = x.detach().clone()
    dist.all_reduce(total)
    return x + (total - x.detach())


def unfused(
    student,
    teacher,
    inner=SumShared.apply,
    outer=SumReplicated.apply,
    temperature=TEMPERATURE,
    columns=VOCAB,
):
    """Vocab-parallel reverse KL in plain autograd, correct with the default arguments."""
    valid = min(max(columns - dist.get_rank() * student.shape[1], 0), student.shape[1])

    def log_softmax(logits):
        return logits - inner(logits.exp().sum(-1, keepdim=True)).log()

    log_p = log_softmax(student[:, :valid] / TEMPERATURE)
    log_q = log_softmax(teacher[:, :valid] / temperature)
    return outer((log_p.exp() * (log_p - log_q)).sum(-1))


def ours(student, teacher):
    return vocab_parallel_kl(student, teacher, group=tp_group(), temperature=TEMPERATURE, vocab_size=VOCAB)


def right(student, teacher):
    return unfused(student, teacher)


def bug_plain_all_reduce(student, teacher):
    return unfused(student, teacher, plain_all_reduce, plain_all_reduce)


def bug_differentiated_everywhere(student, teacher):
    """As torch.distributed.nn.all_reduce: identical gradients of all ranks are summed, TP times too much."""
    return unfused(student, teacher, SumShared.apply, SumShared.apply)


def bug_differentiated_nowhere(student, teacher):
    return unfused(student, teacher, SumReplicated.apply, SumReplicated.apply)


class GatherSummingGradients(torch.autograd.Function):
    """All-gather of columns whose backward sums over ranks, as differentiable all-gathers do."""

    @staticmethod
    def forward(ctx, local):
        ctx.columns = local.shape[1]
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad := grad.clone())
        return grad[:, dist.get_rank() * ctx.columns :][:, : ctx.columns]


def bug_differentiable_all_gather(student, teacher):
    whole = (GatherSummingGradients.apply(logits)[:, :VOCAB] / TEMPERATURE for logits in (student, teacher))
    log_p, log_q = (logits.log_softmax(-1) for logits in whole)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def bug_teacher_temperature(student, teacher):
    return unfused(student, teacher, temperature=1.0)


def bug_padding_takes_part(student, teacher):
    return unfused(student, teacher, columns=16)


def bug_teacher_in_lower_precision(student, teacher):
    return unfused(student, teacher.bfloat16().to(teacher.dtype))


def bug_detached_divergence_as_advantage(student, teacher):
    """KL over the distribution, detached, times log p of the sampled token: no gradient in expectation."""
    log_p = torch.log_softmax(student[:, :VOCAB] / TEMPERATURE, -1)
    return ours(student, teacher).detach() * log_p[:, 0]


def value_and_gradient(rank, implementation):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 16, dtype=torch.float64)
    local = shard(student.t(), rank).t().contiguous().requires_grad_()
    value = implementation(local, shard(teacher.t(), rank).t().contiguous())
    value.sum().backward()
    whole = student.clone().requires_grad_()
    expected = oracle.divergence(*oracle.log_softmaxes(whole, teacher, TEMPERATURE, VOCAB))
    expected.sum().backward()
    gradient = shard(whole.grad.t(), rank).t()
    value_error = (value.detach() - expected.detach()).abs().max()
    return float(value_error), float((local.grad - gradient).norm() / gradient.norm())


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("implementation", [ours, right])
def test_the_check_passes_what_is_right(ranks, tp, implementation):
    for value_error, gradient_error in ranks(tp, value_and_gradient, implementation):
        assert value_error < 1e-12 and gradient_error < 1e-12


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    "bug", [bug_plain_all_reduce, bug_differentiated_everywhere, bug_differentiated_nowhere]
)
def test_collectives_in_autograd_have_the_right_value_and_a_wrong_gradient(ranks, tp, bug):
    """This is why gradients are compared here, not only losses."""
    errors = ranks(tp, value_and_gradient, bug)
    assert all(value_error < 1e-12 for value_error, _ in errors)
    assert max(gradient_error for _, gradient_error in errors) > 0.1


@pytest.mark.parametrize("tp", [2, 4])
def test_a_differentiable_all_gather_gives_tp_times_the_gradient(ranks, tp):
    """Adam hides the factor; clipping and mixing with another loss do not."""
    for value_error, gradient_error in ranks(tp, value_and_gradient, bug_differentiable_all_gather):
        assert value_error < 1e-12
        assert gradient_error == pytest.approx(tp - 1)


@pytest.mark.parametrize(
    "bug", [bug_teacher_temperature, bug_padding_takes_part, bug_teacher_in_lower_precision]
)
def test_the_check_fails_wrong_inputs(ranks, bug):
    errors = ranks(2, value_and_gradient, bug)
    assert max(value_error for value_error, _ in errors) > 1e-5
    assert max(gradient_error for _, gradient_error in errors) > 1e-3


def test_a_detached_divergence_has_another_gradient(ranks):
    ((_, gradient_error),) = ranks(1, value_and_gradient, bug_detached_divergence_as_advantage)
    assert gradient_error > 0.1


def sampled_token_gradients(rank):
    """Gradients for the student's logits [V], as exact expectations over the sampled token y ~ p.

    The losses are sg[KL(p || q)] log p(y); log p(y) - log q(y), for two teachers; sg[log p(y) - log q(y)]
    log p(y); and KL(p || q) from `vocab_parallel_kl`.
    """
    torch.manual_seed(4)
    student, teacher, other = torch.randn(3, 9, dtype=torch.float64)
    p = student.softmax(-1)

    def expected_gradient(loss_of_tokens):
        logits = student.clone().requires_grad_()
        # One row per token, so that the real function computes each log-probability from one hidden state.
        logprobs = sampled_token_logprobs(
            torch.eye(1, dtype=torch.float64).expand(9, 1), logits.unsqueeze(1), torch.arange(9)
        )
        return torch.autograd.grad((p * loss_of_tokens(logprobs)).sum(), logits)[0]

    def kl(teacher):
        logits = student.clone().requires_grad_()
        value = vocab_parallel_kl(logits, teacher)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    log_q, log_other = teacher.log_softmax(-1), other.log_softmax(-1)
    detached = expected_gradient(lambda logprobs: kl(teacher)[0] * logprobs)
    direct = expected_gradient(lambda logprobs: logprobs - log_q)
    direct_other = expected_gradient(lambda logprobs: logprobs - log_other)
    advantage = expected_gradient(lambda logprobs: (logprobs - log_q).detach() * logprobs)
    return detached, direct, direct_other, advantage, kl(teacher)[1]


def test_which_sampled_token_losses_have_the_gradient_of_the_divergence(ranks):
    """Only the detached log-ratio as an advantage does; the other two combinations learn nothing."""
    detached, direct, direct_other, advantage, right = ranks(1, sampled_token_gradients)[0]
    assert right.norm() > 0.1
    assert detached.norm() < 1e-12
    assert torch.equal(direct, direct_other) and direct.norm() < 1e-12
    torch.testing.assert_close(advantage, right)


def test_the_per_token_divergence_cannot_be_differentiated(ranks):
    """`linear_kl` returns a loss to back-propagate and detached per-token values for metrics."""
    assert ranks(1, _per_token_requires_grad) == [(True, False)]


def _per_token_requires_grad(rank):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(8, 4)
    loss, per_token = linear_kl(hidden, weight, torch.randn(3, 4), weight, token_weight=torch.ones(3))
    return loss.requires_grad, per_token.requires_grad


def run_tp_invariance(rank):
    """Loss and hidden gradient of the fused head, which a TP-fold gradient would change."""
    torch.manual_seed(1)
    hidden, teacher_hidden = torch.randn(2, 5, 4, dtype=torch.float64)
    weight, teacher_weight = torch.randn(2, 16, 4, dtype=torch.float64)
    hidden.requires_grad_()
    loss, _ = linear_kl(
        hidden,
        shard(weight, rank),
        teacher_hidden,
        shard(teacher_weight, rank),
        token_weight=torch.ones(5),
        group=tp_group(),
        vocab_size=VOCAB,
    )
    loss.backward()
    return loss.detach(), hidden.grad


def test_loss_and_gradient_do_not_depend_on_tp(ranks):
    loss, gradient = ranks(1, run_tp_invariance)[0]
    for tp in (2, 4):
        for other_loss, other_gradient in ranks(tp, run_tp_invariance):
            torch.testing.assert_close(other_loss, loss)
            torch.testing.assert_close(other_gradient, gradient)


def near_convergence(rank, textbook):
    torch.manual_seed(2)
    student = 3 * torch.randn(64, 512)
    teacher = student + 3e-4 * torch.randn(64, 512)
    if textbook:
        log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    return vocab_parallel_kl(student, teacher)


def test_the_textbook_form_goes_negative_and_ours_does_not(ranks):
    assert (ranks(1, near_convergence, True)[0] < 0).any()
    assert (ranks(1, near_convergence, False)[0] > 0).all()
