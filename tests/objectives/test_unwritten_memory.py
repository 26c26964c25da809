"""Uninitialized memory is NaN in every test (`tests/_unwritten_memory.py`), and no product reads it."""

import pytest
import torch

from megatron_mopd.objectives import linear_cross_entropy, linear_kl, sampled_token_logprobs

PADDED = {
    "mm": lambda a: a @ torch.ones(5, 2, dtype=a.dtype),
    "mm.out": lambda a: torch.mm(a, torch.ones(5, 2, dtype=a.dtype), out=torch.ones(4, 2, dtype=a.dtype)),
    "transposed": lambda a: a.t() @ torch.ones(4, 2, dtype=a.dtype),
    "second factor": lambda a: torch.ones(2, 4, dtype=a.dtype) @ a,
    "linear": lambda a: torch.nn.functional.linear(a, torch.ones(2, 5, dtype=a.dtype), a[:2, 0].clone()),
    "addmm_": lambda a: torch.ones(4, 2, dtype=a.dtype).addmm_(a, torch.ones(5, 2, dtype=a.dtype)),
    "bmm": lambda a: a.expand(3, 4, 5) @ torch.ones(3, 5, 2, dtype=a.dtype),
    "mv": lambda a: a @ torch.ones(5, dtype=a.dtype),
}


def padded_rows(dtype, padding):
    """A view [4, 5] of rows of 6 elements."""
    memory = torch.empty(4, 6, dtype=dtype)
    memory[:, :5] = 1
    if padding is not None:
        memory[:, 5:] = padding
    return memory[:, :5]


@pytest.mark.parametrize("product", PADDED)
def test_products_of_rows_with_unwritten_padding_fail(ranks, product):
    """On any CPU and in any dtype, also on ranks forked from the test's process."""
    for outcomes in ranks(2, _products, product):
        assert outcomes == ["unwritten memory", "unwritten memory", "fine", "fine"]


def _products(rank, product):
    outcomes = []
    for padding in (None, 0.0):
        for dtype in (torch.float64, torch.bfloat16):
            try:
                result = PADDED[product](padded_rows(dtype, padding))
                outcomes.append("fine" if result.isfinite().all() else "not finite")
            except AssertionError as error:
                outcomes.append("unwritten memory" if "unwritten memory" in str(error) else str(error))
    return outcomes


def test_the_element_after_an_odd_last_row_counts_too(ranks):
    (outcome,) = ranks(1, _last_row)
    assert "unwritten memory" in outcome


def _last_row(rank):
    memory = torch.empty(5, 3)
    memory[:4] = 1
    try:
        memory[:4] @ torch.ones(3, 2)
    except AssertionError as error:
        return str(error)
    return "not noticed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size, columns", [(33, 36), (33, 33), (34, 36)])
def test_losses_of_states_and_heads_with_gaps_between_their_rows(ranks, dtype, vocab_size, columns):
    """Gaps in the caller's views are not read, whatever the width of the vocabulary shard."""
    for gaps, without in ranks(1, _losses, dtype, vocab_size, columns)[0]:
        assert gaps.isfinite().all() and torch.equal(gaps, without)


def _losses(rank, dtype, vocab_size, columns):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(rows, 7, generator=generator).to(dtype) for rows in (9, columns, 9, columns)]
    return list(zip(*(_all_objectives(tensors, vocab_size, gaps) for gaps in (True, False))))


def _all_objectives(tensors, vocab_size, gaps):
    """Gradients of the student's hidden state and head for every objective, in chunks of four tokens."""
    ids, weight = torch.arange(9), torch.full((9,), 1 / 9)
    options = dict(vocab_size=vocab_size, chunk_size=4)

    def place(tensor):
        if gaps:
            memory = torch.empty(len(tensor), 8, dtype=tensor.dtype)
            memory[:, :7] = tensor
            tensor = memory[:, :7]
        return tensor.detach().requires_grad_()

    gradients = []
    for objective in ("reverse_kl", "jsd", "cross entropy", "sampled token"):
        hidden, head, teacher_hidden, teacher_head = map(place, tensors)
        if objective == "cross entropy":
            loss, _ = linear_cross_entropy(hidden, head, ids, token_weight=weight, **options)
        elif objective == "sampled token":
            loss = sampled_token_logprobs(hidden, head, ids, **options).sum()
        else:
            loss, _ = linear_kl(
                hidden,
                head,
                [teacher_hidden],
                [teacher_head],
                token_weight=weight,
                divergence=objective,
                **options,
            )
        loss.backward()
        gradients += [hidden.grad, head.grad]
    return gradients
