"""The losses in megatron-core's surroundings: fused accumulation, tied embeddings, SP, CP, packing."""

import pytest
import torch
import torch.distributed as dist

from megatron_mopd.objectives import linear_cross_entropy, linear_kl, sampled_token_logprobs
from tests.objectives import oracle
from tests.objectives.cases import Case, build, run_linear_kl, shard, tp_group

CASE = Case(tokens=8)


def kl(hidden, weight, inputs, rank, rows=slice(None), **options):
    """linear_kl on the tokens `rows` of a built problem."""
    return linear_kl(
        hidden,
        weight,
        inputs.teacher_hiddens[0][rows],
        shard(inputs.teacher_weights[0], rank),
        token_weight=inputs.token_weight[rows],
        group=tp_group(),
        vocab_size=CASE.vocab_size,
        chunk_size=CASE.chunk_size,
        **options,
    )


def fused_accumulation(rank, objective, megatron_flag, tied):
    """Two micro-batches into main_grad; returns (main_grad, autograd's placeholder, flag, plain gradient)."""
    inputs = build(CASE)
    ids = torch.arange(CASE.tokens) % CASE.vocab_size

    def backward(weight, fused):
        if objective == "kl":
            loss, _ = kl(inputs.hidden, weight, inputs, rank, accumulate_into_main_grad=fused)
        elif objective == "cross entropy":
            loss, _ = linear_cross_entropy(
                inputs.hidden,
                weight,
                ids,
                token_weight=inputs.token_weight,
                group=tp_group(),
                vocab_size=29,
                accumulate_into_main_grad=fused,
            )
        else:
            loss = sampled_token_logprobs(
                inputs.hidden, weight, ids, group=tp_group(), vocab_size=29, accumulate_into_main_grad=fused
            ).sum()
        (0.5 * loss).backward()

    plain = shard(inputs.weight, rank).requires_grad_()
    backward(plain, False)
    weight = shard(inputs.weight, rank).requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, dtype=torch.float64)
    if megatron_flag:
        weight.grad_added_to_main_grad = False
    if tied:
        weight.zero_out_wgrad = True
    for _ in range(2):
        weight.grad = None
        backward(weight, True)
    return weight.main_grad, weight.grad, getattr(weight, "grad_added_to_main_grad", None), plain.grad


@pytest.mark.parametrize("objective", ["kl", "cross entropy", "logprobs"])
def test_weight_gradient_goes_where_megatron_accumulates_it(ranks, objective):
    for main_grad, placeholder, flag, plain in ranks(2, fused_accumulation, objective, True, False):
        torch.testing.assert_close(main_grad, 2 * plain)
        assert flag is True and placeholder.shape == plain.shape
    for main_grad, placeholder, flag, plain in ranks(2, fused_accumulation, objective, False, False):
        torch.testing.assert_close(main_grad, 2 * plain)
        assert flag is None and placeholder is None


def test_a_tied_embedding_gets_a_zero_placeholder(ranks):
    """Autograd adds the embedding's own gradient to the placeholder, DDP's hook the sum to main_grad."""
    for main_grad, placeholder, flag, plain in ranks(2, fused_accumulation, "kl", True, True):
        torch.testing.assert_close(main_grad, 2 * plain)
        assert flag is True and torch.equal(placeholder, torch.zeros_like(plain))


class _GatherSequence(torch.autograd.Function):
    """Sequence-parallel entry of a head: all-gather [T/tp, h] -> [T, h]; backward reduce-scatters."""

    @staticmethod
    def forward(ctx, local):
        gathered = local.new_empty(dist.get_world_size() * local.shape[0], local.shape[1])
        dist.all_gather_into_tensor(gathered, local.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad := grad.clone())
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def sequence_parallel(rank):
    inputs = build(CASE)
    local = inputs.hidden.chunk(dist.get_world_size())[rank].clone().requires_grad_()
    weight = shard(inputs.weight, rank).requires_grad_()
    loss, _ = kl(_GatherSequence.apply(local), weight, inputs, rank, reduce_hidden_grad=False)
    loss.backward()
    return local.grad, weight.grad


@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallelism(ranks, tp):
    """Gather first, keep the hidden gradient partial, reduce-scatter it: exact on every rank's tokens."""
    results = ranks(tp, sequence_parallel)
    _, _, hidden_grad, weight_grad = oracle.linear_divergence(CASE, build(CASE))
    torch.testing.assert_close(torch.cat([hidden for hidden, _ in results]), hidden_grad)
    torch.testing.assert_close(torch.cat([weight for _, weight in results]), weight_grad)


@pytest.mark.parametrize("split", [[8], [4, 4], [1, 7], [3, 0, 5], [1] * 8], ids=str)
def test_context_parallelism_and_packing_need_nothing_special(ranks, split):
    """However tokens are dealt to CP ranks, micro-batches or packed rows, losses and gradients add up."""
    expected = oracle.linear_divergence(CASE, build(CASE))
    for loss, hidden_grad, joined in ranks(2, in_pieces, split):
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(hidden_grad, expected[2])
        torch.testing.assert_close(joined, expected[3])


def in_pieces(rank, split):
    inputs = build(CASE)
    weight = shard(inputs.weight, rank).requires_grad_()
    order = torch.randperm(CASE.tokens, generator=torch.Generator().manual_seed(0))
    hidden = inputs.hidden.requires_grad_()
    total = 0
    for rows in order.split(split):
        loss, _ = kl(hidden[rows], weight, inputs, rank, rows)
        loss.backward()
        total = total + loss.detach()
    joined = torch.cat([torch.empty_like(weight.grad) for _ in range(2)])
    dist.all_gather_into_tensor(joined, weight.grad)
    return total, hidden.grad, joined


def test_chunk_size_does_not_matter(ranks):
    first, *others = [ranks(2, run_linear_kl, CASE.but(chunk_size=size))[0] for size in (1, 3, 8, 1000)]
    for other in others:
        for got, want in zip(other, first):
            torch.testing.assert_close(got, want)
