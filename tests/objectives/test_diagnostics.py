"""The optional third result of linear_kl against direct computation."""

import pytest
import torch

from megatron_mopd.objectives import DivergenceDiagnostics, linear_kl
from tests.objectives import oracle
from tests.objectives.cases import Case, build, shard, tp_group


def run(rank, case, top_k):
    inputs = build(case)
    hidden = inputs.hidden.requires_grad_()
    loss, per_token, diagnostics = linear_kl(
        hidden,
        shard(inputs.weight, rank),
        inputs.teacher_hiddens[0],
        shard(inputs.teacher_weights[0], rank),
        token_weight=inputs.token_weight,
        group=tp_group(),
        temperature=case.temperature,
        vocab_size=case.vocab_size,
        chunk_size=case.chunk_size,
        top_k=case.top_k,
        diagnostics_top_k=top_k,
    )
    loss.backward()
    return per_token, tuple(diagnostics), hidden.grad


def expect(case, top_k):
    inputs = build(case)
    student = inputs.hidden @ inputs.weight.t()
    teacher = inputs.teacher_hiddens[0] @ inputs.teacher_weights[0].t()
    log_p, log_q = oracle.log_softmaxes(student, teacher, case.temperature, case.vocab_size)
    p, q = log_p.exp(), log_q.exp()
    top_k = min(top_k, case.vocab_size)
    p_top, q_top = p.topk(top_k), q.topk(top_k)
    shared = (p_top.indices[:, :, None] == q_top.indices[:, None, :]).any(2).sum(1)
    return DivergenceDiagnostics(
        student_entropy=-(p * log_p).sum(1),
        teacher_entropy=-(q * log_q).sum(1),
        teacher_prob_of_student_top1=q.gather(1, p.argmax(1, keepdim=True)).squeeze(1),
        top1_agreement=(p.argmax(1) == q.argmax(1)).double(),
        top_k_overlap=shared / top_k,
        student_top_k_mass=p_top.values.sum(1),
        teacher_top_k_mass=q_top.values.sum(1),
    )


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("top_k", [1, 4, 100])
@pytest.mark.parametrize("options", [{}, {"vocab_size": 6}, {"top_k": 3}, {"tokens": 0}], ids=str)
def test_against_direct_computation(ranks, tp, top_k, options):
    case = Case(**{"tokens": 11, "temperature": 1.4, **options})
    expected = expect(case, top_k)
    for _, diagnostics, _ in ranks(tp, run, case, top_k):
        for name, got, want in zip(DivergenceDiagnostics._fields, diagnostics, expected):
            torch.testing.assert_close(got, want.to(got.dtype), msg=lambda text, name=name: f"{name}: {text}")


def test_they_change_nothing_else(ranks):
    case = Case(tokens=11)
    per_token, _, gradient = ranks(2, run, case, 4)[0]
    inputs = build(case)
    expected = oracle.linear_divergence(case, inputs)
    torch.testing.assert_close(per_token, expected[1])
    torch.testing.assert_close(gradient, expected[2])
