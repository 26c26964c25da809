"""Single-process oracles in fp64 with plain autograd: textbook formulas, without code from the package."""

import math

import torch


def log_softmaxes(student, teacher, temperature=1.0, vocab_size=None):
    """fp64 log-probabilities [..., V] of both models over the real columns only."""
    student, teacher = student.double()[..., :vocab_size], teacher.double()[..., :vocab_size]
    return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


def divergence(log_p, log_q, kind="reverse_kl", beta=0.5):
    """Per-token divergence of log-probabilities [..., V]."""
    if kind == "reverse_kl":
        return _kl(log_p, log_q)
    if kind == "forward_kl":
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _kl(log_a, log_b):
    log_a, log_b = (
        log_a.clamp(min=-1e300),
        log_b.clamp(min=-1e300),
    )  # a token that neither model allows contributes 0
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def truncate(log_p, log_q, top_k, top_k_from):
    """[..., V] -> [..., k + 1]: the top k and one tail outcome."""
    head = (log_q if top_k_from == "teacher" else log_p).topk(top_k, -1).indices
    is_tail = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, head, False)

    def collect(log_prob):
        tail = log_prob.masked_fill(~is_tail, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log_prob.gather(-1, head), tail], -1)

    return collect(log_p), collect(log_q)


def linear_divergence(case, inputs):
    """loss, per_token, hidden gradient and weight gradient of `linear_kl` for a `Case` (see `cases.py`)."""
    hidden, weight = inputs.hidden.double().requires_grad_(), inputs.weight.double().requires_grad_()
    student = hidden @ weight.t()
    shares = inputs.mixture_weight
    per_token = 0
    for k, (teacher_hidden, teacher_weight) in enumerate(zip(inputs.teacher_hiddens, inputs.teacher_weights)):
        teacher = teacher_hidden.double() @ teacher_weight.double().t()
        log_p, log_q = log_softmaxes(student, teacher, case.temperature, case.vocab_size)
        if case.top_k is not None:
            log_p, log_q = truncate(log_p, log_q, min(case.top_k, log_p.shape[1]), case.top_k_from)
        share = 1 if shares is None else shares[..., k].double()
        per_token = per_token + share * divergence(log_p, log_q, case.divergence, case.beta)
    loss = (inputs.token_weight.double() * per_token).sum()
    loss.backward()
    return loss.detach(), per_token.detach(), hidden.grad, weight.grad
