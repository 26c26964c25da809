"""Losses that share the head of a micro-batch have the gradients of their sum, against the fp64 oracle."""

import pytest
import torch

from megatron_mopd.objectives import linear_cross_entropy, linear_kl, sampled_token_logprobs
from megatron_mopd.objectives.micro_batch_head import MicroBatchHead
from tests.objectives import oracle
from tests.objectives.cases import Case, build, shard, tp_group

CASE = Case(tokens=9, teacher_widths=(5, 3))
SPLIT, LATER, SCALE = slice(0, 4), slice(4, 9), -1.5
IDS = torch.arange(9) * 3
ADVANTAGE = torch.linspace(-1, 2, 9, dtype=torch.float64)


def losses(inputs, weight, teacher_weights, hidden, options, part):
    """Two teachers, three divergences on the first tokens; cross-entropy, policy gradient on the rest."""
    total = 0
    for k, kind in ((0, "reverse_kl"), (1, "forward_kl"), (0, "jsd")):
        loss, _ = linear_kl(
            hidden[SPLIT],
            weight,
            inputs.teacher_hiddens[k][SPLIT],
            teacher_weights[k],
            token_weight=inputs.token_weight[SPLIT],
            divergence=kind,
            **part(SPLIT),
            **options,
        )
        total = total + loss
    token_weight = inputs.token_weight[LATER]
    loss, _ = linear_cross_entropy(
        hidden[LATER], weight, IDS[LATER], token_weight=token_weight, **part(LATER), **options
    )
    logprobs = sampled_token_logprobs(
        hidden[LATER], weight, IDS[LATER], temperature=0.7, **part(LATER), **options
    )
    policy = -(ADVANTAGE[LATER] * logprobs.exp()).sum()
    if part(LATER):
        policy.backward()
        policy = policy.detach()
    return total + loss + policy


def shared(rank, main_grad, tied, dtype):
    """(loss, hidden gradient, weight gradient, placeholder, flag) with one head for all losses."""
    inputs = build(CASE.but(dtype=dtype))
    hidden, weight = inputs.hidden.requires_grad_(), shard(inputs.weight, rank).requires_grad_()
    if main_grad:
        weight.main_grad = torch.zeros(weight.shape, dtype=torch.promote_types(dtype, torch.float32))
        weight.grad_added_to_main_grad = False
        if tied:
            weight.zero_out_wgrad = True
    options = dict(group=tp_group(), vocab_size=CASE.vocab_size, chunk_size=CASE.chunk_size)
    head = MicroBatchHead(hidden, weight, group=tp_group(), vocab_size=CASE.vocab_size)
    total = losses(
        inputs,
        weight.detach(),
        [shard(teacher, rank) for teacher in inputs.teacher_weights],
        hidden.detach(),
        options,
        lambda rows: {"shared_gradient": head.part(rows)},
    )
    loss = head.loss(total)
    (SCALE * loss).backward()
    gradient, placeholder = (weight.main_grad, weight.grad) if main_grad else (weight.grad, None)
    return loss.detach(), hidden.grad, gradient, placeholder, getattr(weight, "grad_added_to_main_grad", None)


def expected():
    inputs = build(CASE)
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    log_p = (hidden @ weight.t())[:, : CASE.vocab_size].log_softmax(-1)
    total = 0
    for k, kind in ((0, "reverse_kl"), (1, "forward_kl"), (0, "jsd")):
        logits = inputs.teacher_hiddens[k] @ inputs.teacher_weights[k].t()
        log_q = logits[:, : CASE.vocab_size].log_softmax(-1)
        per_token = oracle.divergence(log_p[SPLIT], log_q[SPLIT], kind)
        total = total + (inputs.token_weight[SPLIT] * per_token).sum()
    own = log_p.gather(1, IDS[:, None])[:, 0]
    total = total - (inputs.token_weight * own)[LATER].sum()
    cooler = ((hidden @ weight.t())[:, : CASE.vocab_size] / 0.7).log_softmax(-1).gather(1, IDS[:, None])[:, 0]
    total = total - (ADVANTAGE * cooler.exp())[LATER].sum()
    (SCALE * total).backward()
    return total.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("main_grad, tied", [(False, False), (True, False), (True, True)])
def test_gradients_are_those_of_the_sum(ranks, tp, main_grad, tied):
    loss, hidden_grad, weight_grad = expected()
    results = ranks(tp, shared, main_grad, tied, torch.float64)
    for found, hidden, _, placeholder, flag in results:
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(hidden, hidden_grad)
        assert (flag is True and placeholder is not None) if main_grad else flag is None
        if tied:  # autograd adds the embedding's gradient to it
            assert torch.equal(placeholder, torch.zeros_like(placeholder))
    torch.testing.assert_close(torch.cat([result[2] for result in results]), weight_grad)


def test_low_precision(ranks):
    """The weight's gradient is added from fp32 sums to main_grad without rounding to bfloat16."""
    _, hidden_grad, weight_grad = expected()
    results = ranks(2, shared, True, False, torch.bfloat16)
    found = torch.cat([result[2] for result in results])
    assert found.dtype == torch.float32
    for got, want in ((found, weight_grad), (results[0][1], hidden_grad)):
        assert (got.double() - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize("main_grad", [False, True])
def test_a_micro_batch_without_losses_reaches_head_and_states(ranks, main_grad):
    """Data-parallel hooks wait for every parameter, including the head of a micro-batch without tokens."""
    for hidden, weight, total in ranks(2, _nothing, main_grad):
        assert hidden.shape == (0, 6)
        assert weight is not None and total.abs().max() == 0


def _nothing(rank, main_grad):
    inputs = build(CASE.but(tokens=0))
    hidden, weight = inputs.hidden.requires_grad_(), shard(inputs.weight, rank).requires_grad_()
    if main_grad:
        weight.main_grad = torch.zeros_like(weight)
        weight.grad_added_to_main_grad = False
    MicroBatchHead(hidden, weight, group=tp_group()).loss(torch.zeros(())).backward()
    return hidden.grad, weight.grad, weight.main_grad if main_grad else weight.grad


def test_nothing_is_kept_where_nothing_is_differentiated(ranks):
    assert ranks(1, _no_grad) == [(False, None, None)]


def _no_grad(rank):
    inputs = build(CASE)
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    with torch.no_grad():
        head = MicroBatchHead(hidden, weight, vocab_size=CASE.vocab_size)
        loss, _ = linear_cross_entropy(
            hidden,
            weight,
            IDS,
            token_weight=inputs.token_weight,
            vocab_size=CASE.vocab_size,
            shared_gradient=head.part(slice(0, 9)),
        )
        return head.loss(loss).requires_grad, head.gradient.hidden, head.gradient.weight
