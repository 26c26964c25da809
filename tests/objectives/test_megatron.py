"""The losses in megatron-core: fused gradient accumulation, tied embeddings, SP, CP, packing."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_mopd.model.gpt import unwrap
from megatron_mopd.objectives import linear_cross_entropy, linear_kl, sampled_token_logprobs
from tests import _models
from tests.objectives import oracle
from tests.objectives.cases import Case, build, run_linear_kl, shard, tp_group

CASE = Case(tokens=8)
SMALL = _models.DENSE | {"num_layers": 1}


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
    """Accumulate two micro-batches in main_grad; returns it, autograd's placeholder, the flag, and the plain
    gradient of one micro-batch."""
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
    """Autograd adds the embedding's gradient to the placeholder; DDP's hook adds the sum to main_grad."""
    for main_grad, placeholder, flag, plain in ranks(2, fused_accumulation, "kl", True, True):
        torch.testing.assert_close(main_grad, 2 * plain)
        assert flag is True and torch.equal(placeholder, torch.zeros_like(plain))


class _GatherSequence(torch.autograd.Function):
    """Sequence-parallel input of a head: all-gathers [T/tp, h] -> [T, h]; the backward reduce-scatters."""

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
    """Gather, keep the hidden gradient partial, reduce-scatter it: exact for every rank's tokens."""
    results = ranks(tp, sequence_parallel)
    _, _, hidden_grad, weight_grad = oracle.linear_divergence(CASE, build(CASE))
    torch.testing.assert_close(torch.cat([hidden for hidden, _ in results]), hidden_grad)
    torch.testing.assert_close(torch.cat([weight for _, weight in results]), weight_grad)


@pytest.mark.parametrize("split", [[8], [4, 4], [1, 7], [3, 0, 5], [1] * 8], ids=str)
def test_context_parallelism_and_packing_need_nothing_special(ranks, split):
    """Losses and gradients add up for any split of tokens into CP ranks, micro-batches or packed rows."""
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


def layout(tp):
    """This rank's (tensor-parallel group, rank in it, context-parallel group, rank in it) on 4 ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    tp_groups = [dist.new_group(range(start, start + tp)) for start in range(0, world, tp)]
    cp_groups = [dist.new_group(range(offset, world, tp)) for offset in range(tp)]
    return tp_groups[rank // tp], rank % tp, cp_groups[rank % tp], rank // tp


def context_parallel(rank, tp, tokens_of):
    """Each CP rank computes the loss of its own tokens; loss and gradients are summed over the CP group."""
    tp_group, tp_rank, cp_group, cp_rank = layout(tp)
    inputs = build(CASE)
    rows = torch.tensor(tokens_of[cp_rank], dtype=torch.long)
    columns = inputs.weight.shape[0] // tp
    block = slice(tp_rank * columns, (tp_rank + 1) * columns)
    hidden = inputs.hidden[rows].requires_grad_()
    weight = inputs.weight[block].clone().requires_grad_()
    loss, _ = linear_kl(
        hidden,
        weight,
        inputs.teacher_hiddens[0][rows],
        inputs.teacher_weights[0][block],
        token_weight=inputs.token_weight[rows],
        group=tp_group,
        vocab_size=CASE.vocab_size,
        chunk_size=CASE.chunk_size,
    )
    loss.backward()
    total = torch.stack([loss.detach()])
    dist.all_reduce(total, group=cp_group)
    dist.all_reduce(weight.grad, group=cp_group)
    return total[0], rows, hidden.grad, (tp_rank, weight.grad)


@pytest.mark.parametrize(
    "tp, tokens_of",
    [
        (2, [[0, 1, 6, 7], [2, 3, 4, 5]]),  # megatron-core's zigzag: first and last quarter, middle half
        (2, [[], list(range(8))]),  # a rank without a token still takes part in the sum
        (1, [[5], [0, 2, 7, 4], [], [1, 3, 6]]),
    ],
)
def test_context_parallel_ranks(ranks, tp, tokens_of):
    """Separate groups, none of them the default one: no rank waits for ranks of another group."""
    loss, _, hidden_grad, weight_grad = oracle.linear_divergence(CASE, build(CASE))
    shards = {}
    for total, rows, found, (tp_rank, shard_grad) in ranks(4, context_parallel, tp, tokens_of):
        torch.testing.assert_close(total, loss)
        torch.testing.assert_close(found, hidden_grad[rows])
        torch.testing.assert_close(shard_grad, shards.setdefault(tp_rank, shard_grad))
    torch.testing.assert_close(torch.cat([shards[tp_rank] for tp_rank in range(tp)]), weight_grad)


def fused_in_a_model(rank, tied, sequence_parallel):
    """main_grad of every parameter of a model under megatron-core's DDP, without and with fusion."""
    parallel = {
        "tensor_model_parallel_size": dist.get_world_size(),
        "sequence_parallel": sequence_parallel,
    }
    model = {"share_embeddings_and_output_weights": tied}
    learner = _models.make_learner(SMALL, parallel, kind="sft", model=model)
    (wrapped,) = learner.chunks
    chunk = unwrap(wrapped)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(_models.VOCAB, (2, 8), generator=generator)
    positions = torch.arange(8).expand(2, 8)
    teacher_hidden = torch.randn(16, 12, generator=generator, dtype=torch.float64)
    padded = chunk.head_weight().shape[0] * dist.get_world_size()
    teacher_weight = shard(torch.randn(padded, 12, generator=generator, dtype=torch.float64), rank)
    result = []
    for fused in (False, True):
        wrapped.zero_grad_buffer()
        for _ in range(2):  # micro-batches accumulate
            hidden = wrapped(tokens, positions, None)
            if sequence_parallel:
                hidden = gather_from_sequence_parallel_region(
                    hidden, tensor_parallel_output_grad=True, group=learner.groups.tp
                )
            loss, _ = linear_kl(
                hidden.flatten(0, 1),
                chunk.head_weight(),
                teacher_hidden,
                teacher_weight,
                token_weight=torch.full((16,), 1 / 16),
                group=learner.groups.tp,
                vocab_size=_models.VOCAB,
                chunk_size=5,
                reduce_hidden_grad=not sequence_parallel,
                accumulate_into_main_grad=fused,
            )
            loss.backward()
        result.append({name: p.main_grad.clone() for name, p in chunk.named_parameters()})
    head = chunk.head_weight()
    return *result, getattr(head, "zero_out_wgrad", False), head.grad_added_to_main_grad


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp, sequence_parallel", [(1, False), (2, False), (2, True)])
def test_fused_accumulation_in_a_model_under_ddp(ranks, tied, tp, sequence_parallel):
    for plain, fused, zero_out, added in ranks(tp, fused_in_a_model, tied, sequence_parallel):
        assert zero_out == tied and added
        assert plain.keys() == fused.keys()
        for name, expected in plain.items():
            assert expected.abs().max() > 0, name
            torch.testing.assert_close(fused[name], expected, msg=lambda m, name=name: f"{name}: {m}")


def test_chunk_size_does_not_matter(ranks):
    first, *others = [ranks(2, run_linear_kl, CASE.but(chunk_size=size))[0] for size in (1, 3, 8, 1000)]
    for other in others:
        for got, want in zip(other, first):
            torch.testing.assert_close(got, want)
