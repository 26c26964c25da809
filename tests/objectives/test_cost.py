"""What the losses may cost: collectives and their bytes, counted; peak memory, measured."""

import pytest
import torch

from benchmarks.divergence import CountCollectives, peak_memory
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
    """Exactly these, in whatever order; the backward has none that a bare head would not have."""
    for in_forward, in_backward, _ in ranks(2, collectives_of, what, options):
        assert sorted(in_forward) == sorted(forward)
        assert sorted(in_backward) == sorted(backward)


def test_bytes_per_token(ranks):
    """24 bytes a token beyond what a bare head needs, and a constant for the agreement."""
    agreement = 2 * 16 * 8
    for _, _, size in ranks(2, collectives_of, "linear_kl", {}):
        assert size == 24 * TOKENS + agreement


def peak_of_linear_kl(rank, tokens, chunk):
    """Allocator peak beyond inputs and the gradients to return, in bytes."""
    hidden, weight, teacher_hidden, teacher_weight = problem(rank, tokens, width=16, columns=2048)
    token_weight = torch.ones(tokens)

    def step():
        loss, _ = linear_kl(
            hidden, weight, teacher_hidden, teacher_weight, token_weight=token_weight, chunk_size=chunk
        )
        loss.backward()

    step()
    hidden.grad = weight.grad = None
    return peak_memory(step, torch.device("cpu")) - 4 * (hidden.numel() + weight.numel())


def test_peak_memory_grows_with_the_chunk_and_not_with_tokens(ranks):
    small, large = (ranks(1, peak_of_linear_kl, tokens, 128)[0] for tokens in (512, 2048))
    assert large <= 1.1 * small, (small, large)
    two_chunks = 2 * 128 * 2048 * 4
    tiles = 8 * 2**17 * 4
    assert large < two_chunks + tiles + 2**19
    assert ranks(1, peak_of_linear_kl, 2048, 1024)[0] > large
