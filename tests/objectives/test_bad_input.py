"""Bad input raises a ValueError with expected and actual values on every rank, even if only one has it."""

import re

import pytest
import torch
import torch.distributed as dist

from megatron_mopd.objectives import (
    linear_cross_entropy,
    linear_kl,
    sampled_token_logprobs,
    vocab_parallel_kl,
)
from tests.objectives.cases import Case, build, shard, tp_group


def message_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def call_linear_kl(rank, changes, only_on=None):
    inputs = build(Case())
    arguments = {
        "student_hidden": inputs.hidden,
        "student_weight": shard(inputs.weight, rank),
        "teacher_hidden": inputs.teacher_hiddens[0],
        "teacher_weight": shard(inputs.teacher_weights[0], rank),
        "token_weight": inputs.token_weight,
        "group": tp_group(),
        "vocab_size": 29,
    }
    if only_on in (None, rank):
        for name, change in changes.items():
            arguments[name] = change(arguments[name]) if callable(change) else change
    return message_of(lambda: linear_kl(**arguments))


def fewer_rows(tensor):
    return tensor[:-1]


def fewer_columns(tensor):
    return tensor[:, :-1]


def to_float32(tensor):
    return tensor.float()


def elsewhere(tensor):
    return tensor.to("meta")


def to_integer(tensor):
    return tensor.long()


def with_infinity(tensor):
    return with_nan(tensor).nan_to_num(nan=torch.inf)


def repeated(tensor):
    return [tensor, tensor]


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[0] = torch.nan
    return tensor


BAD = [
    ({"beta": 1.5, "divergence": "jsd"}, r"beta must be in \[0, 1\], got 1.5"),
    ({"temperature": -1.0}, "temperature must be above 0 and finite, got -1.0"),
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"divergence": "kl"}, "divergence must be one of reverse_kl, forward_kl, jsd, got 'kl'"),
    ({"chunk_size": 0}, "chunk_size must be at least 1 token, got 0"),
    ({"vocab_size": 1000}, r"vocab_size must be in \[1, 36\].*got 1000"),
    ({"vocab_size": 0}, "vocab_size must be in"),
    ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ({"top_k": 3, "top_k_from": "both"}, "top_k_from must be"),
    ({"diagnostics_top_k": 0}, "diagnostics_top_k must be at least 1"),
    ({"teacher_weight": fewer_rows}, "same padded vocabulary width, got 18 and 17"),
    ({"teacher_hidden": fewer_rows}, "same tokens, got 7 and 6"),
    ({"student_hidden": to_float32}, "student hidden and weight must share one .*float32.*float64"),
    (
        {"student_hidden": to_float32, "student_weight": to_float32},
        "teacher hidden must have the student's dtype, torch.float32, got torch.float64",
    ),
    ({"student_weight": fewer_columns}, r"student hidden and weight must be .* \[7, 6\] and \[18, 5\]"),
    ({"token_weight": fewer_rows}, r"token_weight must be \[T\] = \[7\] .* got \[6\]"),
    ({"token_weight": elsewhere}, r"token_weight must be \[T\] = \[7\] on cpu, got \[7\] on meta"),
    (
        {"student_hidden": elsewhere},
        "share one floating point dtype and one device, got .* on meta and .* on cpu",
    ),
    (
        {"student_weight": elsewhere},
        "share one floating point dtype and one device, got .* on cpu and .* on meta",
    ),
    (
        {"teacher_hidden": elsewhere, "teacher_weight": elsewhere},
        "teacher hidden must have the student's device, cpu, got meta",
    ),
    ({"student_hidden": to_integer, "student_weight": to_integer}, "share one floating point dtype"),
    ({"student_hidden": with_infinity}, "is not finite at token 0 .*student logit of vocabulary id 0 is"),
    ({"token_weight": with_nan}, "token_weight must be finite, got nan at token 0"),
    ({"teacher_hidden": repeated}, "one teacher hidden per teacher weight and at least one, got 2 and 1"),
    (
        {"teacher_hidden": repeated, "teacher_weight": repeated, "divergence": "forward_kl"},
        "several teachers share one softmax only under reverse_kl",
    ),
    ({"mixture_weight": torch.ones(3)}, r"mixture_weight must be \[K\] or \[T, K\].*got \[3\]"),
    ({"mixture_weight": -torch.ones(1)}, "mixture_weight must be finite and not negative"),
    ({"accumulate_into_main_grad": True}, "needs a weight with a main_grad buffer"),
]


@pytest.mark.parametrize("changes, pattern", BAD, ids=[pattern[:40] for _, pattern in BAD])
def test_linear_kl(ranks, changes, pattern):
    for message in ranks(2, call_linear_kl, changes):
        assert re.search(pattern, message), message


def test_a_mistake_on_one_rank_is_raised_on_all(ranks):
    """An error on only one rank would leave the other waiting in a collective."""
    for message in ranks(2, call_linear_kl, {"temperature": -1.0}, 1):
        assert message == "rank 1: temperature must be above 0 and finite, got -1.0"


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"chunk_size": 3}, "chunk_size is [1024, 3] on ranks 0 to 1"),
        ({"vocab_size": 31}, "vocab_size is [29, 31] on ranks 0 to 1"),
        ({"temperature": 1.1}, "temperature is [1.0, 1.1] on ranks 0 to 1"),
        ({"beta": 0.25}, "beta is [0.5, 0.25] on ranks 0 to 1"),
        ({"divergence": "jsd"}, "divergence is ['reverse_kl', 'jsd'] on ranks 0 to 1"),
        ({"top_k": 2, "top_k_from": "student"}, "top_k is [0, 2] on ranks 0 to 1; top_k_from is"),
        ({"reduce_hidden_grad": False}, "reduce_hidden_grad is [True, False] on ranks 0 to 1"),
        (
            dict.fromkeys(("student_hidden", "teacher_hidden", "token_weight"), fewer_rows),
            "number of tokens is [7, 6] on ranks 0 to 1",
        ),
        (
            dict.fromkeys(("student_weight", "teacher_weight"), fewer_rows),
            "local vocabulary width is [18, 17] on ranks 0 to 1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_ranks_that_disagree(ranks, changes, expected):
    """Shard sizes or options that differ in the group would otherwise cause wrong results or a hang."""
    for message in ranks(2, call_linear_kl, changes, 1):
        assert message.startswith("ranks of one tensor-parallel group must agree: ")
        assert expected in message


def call_with_a_group_of_others(rank):
    others = [dist.new_group([0]), dist.new_group([1])][1 - rank]
    return call_linear_kl(rank, {"group": others, "vocab_size": None})


def test_a_group_without_this_process(ranks):
    for rank, message in enumerate(ranks(2, call_with_a_group_of_others)):
        assert message == f"group must contain this process (global rank {rank}), it does not"


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("name, model", [("student_weight", "student"), ("teacher_weight", "teacher")])
@pytest.mark.parametrize(
    "options", [{}, {"divergence": "forward_kl"}, {"divergence": "jsd"}, {"top_k": 3}], ids=str
)
def test_nan_in_one_shard_names_rank_and_token(ranks, culprit, name, model, options):
    for message in ranks(2, call_linear_kl, {name: with_nan, **options}, culprit if not options else None):
        assert "is not finite at token 0" in message
        assert f"rank {culprit}: {model} logit of vocabulary id {18 * culprit} is nan" in message


def call_others(rank):
    inputs = build(Case())
    hidden, weight = inputs.hidden, shard(inputs.weight, rank)
    ids = torch.zeros(7, dtype=torch.long)
    common = {"group": tp_group(), "vocab_size": 29}
    logits = torch.randn(3, 8)
    infinite = logits.clone()
    infinite[1, 2] = torch.inf
    masked = logits.clone()
    masked[2, 3] = -torch.inf
    ids_outside = torch.full((7,), 29)
    return {
        "ids": message_of(lambda: sampled_token_logprobs(hidden, weight, ids_outside, **common)),
        "float ids": message_of(lambda: sampled_token_logprobs(hidden, weight, ids.float(), **common)),
        "temperature": message_of(
            lambda: sampled_token_logprobs(hidden, weight, ids, temperature=0, **common)
        ),
        "nan": message_of(lambda: sampled_token_logprobs(with_nan(hidden), weight, ids, **common)),
        "target": message_of(
            lambda: linear_cross_entropy(hidden, weight, ids - 5, token_weight=inputs.token_weight, **common)
        ),
        "chunk": message_of(
            lambda: linear_cross_entropy(
                hidden, weight, ids, token_weight=inputs.token_weight, chunk_size=-1, **common
            )
        ),
        "shape": message_of(lambda: vocab_parallel_kl(logits, logits[:2], group=tp_group())),
        "dtype": message_of(lambda: vocab_parallel_kl(logits, logits.double(), group=tp_group())),
        "device": message_of(lambda: vocab_parallel_kl(logits, logits.to("meta"), group=tp_group())),
        "beta": message_of(lambda: vocab_parallel_kl(logits, logits, divergence="jsd", beta=-0.1)),
        "vocabulary": message_of(lambda: vocab_parallel_kl(logits, logits, vocab_size=9)),
        "cold": message_of(lambda: vocab_parallel_kl(logits, logits, temperature=-0.5)),
        "integer": message_of(lambda: vocab_parallel_kl(logits.long(), logits.long(), group=tp_group())),
        "inf": message_of(lambda: vocab_parallel_kl(infinite, logits, group=tp_group())),
        "one-sided mask": message_of(lambda: vocab_parallel_kl(logits, masked, group=tp_group())),
        "allowed mask": message_of(lambda: vocab_parallel_kl(masked, logits, group=tp_group())),
        "all masked": message_of(
            lambda: vocab_parallel_kl(logits - torch.inf, logits - torch.inf, group=tp_group())
        ),
    }


def test_the_other_functions(ranks):
    for messages in ranks(2, call_others):
        assert "token ids must be in [0, 29), got 29 at token 0" in messages["ids"]
        assert "must be integers, got torch.float32" in messages["float ids"]
        assert "temperature must be above 0" in messages["temperature"]
        assert "token log-probability is not finite at token 0" in messages["nan"]
        assert "must be in [0, 29), got -5 at token 0" in messages["target"]
        assert "chunk_size must be at least 1 token, got -1" in messages["chunk"]
        assert "got [3, 8] and [2, 8]" in messages["shape"]
        assert "dtype, torch.float32, got torch.float64" in messages["dtype"]
        assert "teacher logits must have the student's device, cpu, got meta" in messages["device"]
        assert messages["beta"] == "beta must be in [0, 1], got -0.1"
        assert "vocab_size must be in [1, 8] (1 shards of 8 columns), got 9" in messages["vocabulary"]
        assert messages["cold"] == "temperature must be above 0 and finite, got -0.5"
        assert "must be floating point, got torch.int64" in messages["integer"]
        assert "not finite at token 1 (rank 0: student logit of vocabulary id 2 is inf" in messages["inf"]
        assert (
            "not finite at token 2 (rank 0: teacher logit of vocabulary id 3 is -inf"
            in messages["one-sided mask"]
        )
        assert messages["allowed mask"] == "no error"
        assert "not finite at token 0" in messages["all masked"]
