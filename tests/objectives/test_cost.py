"""Cost of the losses: counts of collectives and their bytes, and measured peak memory."""

import pytest
import torch

from benchmarks.divergence import CountCollectives, memory_use
from megatron_mopd.objectives import (
    linear_cross_entropy,
    linear_kl,
    sampled_token_logprobs,
    vocab_parallel_kl,
)
from tests.objectives.cases import tp_group

TOKENS, CHUNK, WIDTH, COLUMNS = 20, 8, 6, 16
CHUNKS = 3
AGREEMENT = ("all_reduce", (2, 16))
HIDDEN_SUMS = [("all_reduce", (rows, WIDTH)) for rows in (8, 8, 4)]


def problem(rank, tokens=TOKENS, width=WIDTH, columns=COLUMNS):
    shared = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(rank)
    hiddens = [torch.randn(tokens, width, generator=shared) for _ in range(2)]
    weights = [torch.randn(columns, width, generator=own) for _ in range(2)]
    return hiddens[0].requires_grad_(), weights[0].requires_grad_(), hiddens[1], weights[1]


def collectives_of(rank, what, options):
    """(name, shape) of every collective in forward and in backward, and the forward's bytes."""
    hidden, weight, teacher_hidden, teacher_weight = problem(rank)
    ids = torch.arange(TOKENS) % COLUMNS
    common = {"group": tp_group(), **options}
    with CountCollectives() as forward:
        if what == "linear_kl":
            teachers = common.pop("teachers", 1)
            loss, *_ = linear_kl(
                hidden,
                weight,
                [teacher_hidden] * teachers,
                [teacher_weight] * teachers,
                token_weight=torch.ones(TOKENS),
                chunk_size=CHUNK,
                **common,
            )
        elif what == "linear_cross_entropy":
            loss, _ = linear_cross_entropy(
                hidden, weight, ids, token_weight=torch.ones(TOKENS), chunk_size=CHUNK, **common
            )
        elif what == "sampled_token_logprobs":
            loss = sampled_token_logprobs(hidden, weight, ids, chunk_size=CHUNK, **common).sum()
        else:
            student = (hidden @ weight.t()).detach().requires_grad_()
            loss = vocab_parallel_kl(student, teacher_hidden @ teacher_weight.t(), **common).sum()
    with CountCollectives() as backward:
        loss.backward()
    calls = [[(name, shape) for name, _, shape in counted.calls] for counted in (forward, backward)]
    return *calls, forward.bytes_beyond_head(WIDTH)


def gathers(rows_of_statistics):
    """One all-gather of flattened [rows_of_statistics, c] for each chunk."""
    return [("all_gather", (rows_of_statistics * rows,)) for rows in (8, 8, 4)]


@pytest.mark.parametrize(
    "what, options, forward, backward",
    [
        ("linear_kl", {}, [AGREEMENT, *gathers(5), ("all_reduce", (TOKENS,)), *HIDDEN_SUMS], []),
        (
            "linear_kl",
            {"reduce_hidden_grad": False},
            [AGREEMENT, *gathers(5), ("all_reduce", (TOKENS,))],
            [],
        ),
        (
            "linear_kl",
            {"divergence": "forward_kl"},
            [AGREEMENT, *gathers(4), ("all_reduce", (TOKENS,)), *HIDDEN_SUMS],
            [],
        ),
        (
            "linear_kl",
            {"divergence": "jsd"},
            [
                AGREEMENT,
                *gathers(4),
                *(("all_reduce", (rows,)) for rows in (8, 8, 4)),
                ("all_reduce", (TOKENS,)),
                *HIDDEN_SUMS,
            ],
            [],
        ),
        (
            "linear_kl",
            {"top_k": 2},
            [AGREEMENT, *gathers(2), *gathers(9), ("all_reduce", (TOKENS,)), *HIDDEN_SUMS],
            [],
        ),
        (
            "linear_kl",
            {"teachers": 3},
            [
                AGREEMENT,
                *gathers(5),
                ("all_gather", (2 * 4 * TOKENS,)),
                ("all_reduce", (TOKENS,)),
                *HIDDEN_SUMS,
            ],
            [],
        ),
        (
            "linear_kl",
            {"diagnostics_top_k": 2},
            [
                AGREEMENT,
                *gathers(5),
                *gathers(9),
                ("all_reduce", (TOKENS,)),
                ("all_reduce", (2, TOKENS)),
                *HIDDEN_SUMS,
            ],
            [],
        ),
        ("linear_cross_entropy", {}, [AGREEMENT, *gathers(3), *HIDDEN_SUMS], []),
        (
            "sampled_token_logprobs",
            {},
            [AGREEMENT, ("all_gather", (3 * TOKENS,))],
            HIDDEN_SUMS,
        ),
        (
            "vocab_parallel_kl",
            {},
            [AGREEMENT, ("all_gather", (5 * TOKENS,)), ("all_reduce", (2, TOKENS))],
            [],
        ),
    ],
    ids=str,
)
def test_collectives(ranks, what, options, forward, backward):
    """Exactly these collectives in any order; the backward has none that a plain head would not have."""
    for in_forward, in_backward, _ in ranks(2, collectives_of, what, options):
        assert sorted(in_forward) == sorted(forward)
        assert sorted(in_backward) == sorted(backward)


@pytest.mark.parametrize("divergence, size", [("reverse_kl", 24), ("forward_kl", 20), ("jsd", 24)])
def test_bytes_per_token(ranks, divergence, size):
    """At most 32 bytes per token more than a plain head, plus a constant for the agreement."""
    agreement = 2 * 16 * 8
    for _, _, total in ranks(2, collectives_of, "linear_kl", {"divergence": divergence}):
        assert total == size * TOKENS + agreement


def memory_of(rank, what, tokens, chunk):
    """Bytes: (forward's peak, saved by the forward, backward's peak), without inputs and returned gradients.

    The backward's peak is relative to the memory held when it starts.
    """
    hidden, weight, teacher_hidden, teacher_weight = problem(rank, tokens, width=64, columns=2048)
    token_weight, ids = torch.ones(tokens), torch.arange(tokens) % 2048

    def forward():
        if what == "linear_kl":
            return linear_kl(
                hidden, weight, teacher_hidden, teacher_weight, token_weight=token_weight, chunk_size=chunk
            )[0]
        if what == "linear_cross_entropy":
            return linear_cross_entropy(hidden, weight, ids, token_weight=token_weight, chunk_size=chunk)[0]
        return sampled_token_logprobs(hidden, weight, ids, chunk_size=chunk).sum()

    forward().backward()  # so that allocations made once per process do not count
    hidden.grad = weight.grad = None
    gradients = 4 * (hidden.numel() + weight.numel())
    results = []
    peak, kept = memory_use(lambda: results.append(forward()), torch.device("cpu"))
    backward_peak, _ = memory_use(results[0].backward, torch.device("cpu"))
    if what == "sampled_token_logprobs":  # allocates its gradients in the backward
        return peak, kept, backward_peak - gradients
    return peak - gradients, kept - gradients, backward_peak


@pytest.mark.parametrize("what", ["linear_kl", "linear_cross_entropy", "sampled_token_logprobs"])
def test_memory_grows_with_the_chunk_and_not_with_tokens(ranks, what):
    """In forward and backward, without saved logits. Logits of 1024 tokens would take 8 MiB per model, and a
    copy of the hidden gradient 0.25 MiB."""
    small, large = (ranks(1, memory_of, what, tokens, 64)[0] for tokens in (256, 1024))
    scalars = 64 * 1024  # a few numbers per token
    for peak_of_few, peak_of_many in zip(small, large):
        assert peak_of_many <= 1.05 * peak_of_few + scalars, (small, large)
    forward_peak, kept, backward_peak = large
    two_chunks = 2 * 64 * 2048 * 4
    tiles = 8 * 2**17 * 4
    assert forward_peak < two_chunks + tiles + 2**19
    assert kept < scalars
    assert backward_peak < (two_chunks + tiles + 2**19 if what == "sampled_token_logprobs" else scalars)
    assert ranks(1, memory_of, what, 1024, 512)[0][0] > forward_peak


def test_retaining_the_graph_keeps_the_buffers(ranks):
    """The backward returns its buffers as gradients only if no second backward can need them."""
    once, twice, stolen = ranks(1, _retain)[0]
    assert torch.equal(2 * once, twice)
    assert stolen


def _retain(rank):
    hidden, weight, teacher_hidden, teacher_weight = problem(rank)
    loss, _ = linear_kl(hidden, weight, teacher_hidden, teacher_weight, token_weight=torch.ones(TOKENS))
    once = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    twice = once + torch.autograd.grad(loss, hidden)[0]
    try:
        loss.backward()
    except RuntimeError as error:
        return once, twice, "second time" in str(error)
    return once, twice, False
