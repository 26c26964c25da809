"""Micro-batches: which hidden state predicts which token, which tokens count in the loss, and equal numbers
of micro-batches on all ranks."""

import random

import pytest
import torch

from megatron_mopd.data.batching import (
    BatchShape,
    collate,
    equalize,
    group_micro_batches,
    split_over_ranks,
)
from tests._models import trajectory

LAYOUTS = [
    dict(max_tokens=None, tp_size=1, cp_size=1),
    dict(max_tokens=64, tp_size=1, cp_size=1),
    dict(max_tokens=None, tp_size=2, cp_size=2),
    dict(max_tokens=64, tp_size=2, cp_size=2),
    dict(max_tokens=64, tp_size=1, cp_size=4),
]


def trajectories(count=7, seed=0):
    """Every token of the batch has a different id, so a token identifies its position."""
    rng, number, result = random.Random(seed), 1, []
    for index in range(count):
        prompt, response = rng.randint(1, 9), rng.randint(0, 9)
        ids = list(range(number, number + prompt + response))
        number += prompt + response
        result.append(trajectory(index, ids[:prompt], ids[prompt:], f"domain {index % 3}"))
    return result


def micro_batches(batch, layout, fixed=False):
    """The micro-batches of every context-parallel rank, one list for each micro-batch."""
    shapes = [
        BatchShape.for_batch(batch, micro_batch_size=3, cp_rank=rank, fixed=fixed, **layout)
        for rank in range(layout["cp_size"])
    ]
    return [[collate(group, shape) for shape in shapes] for group in group_micro_batches(batch, shapes[0])]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_hidden_state_predicts_the_token_after_it(layout, fixed):
    """Without this shift a model learns to copy. Ids are consecutive, so the next token is one higher."""
    batch = trajectories()
    predicted = []
    for parts in micro_batches(batch, layout, fixed):
        for part in parts:
            # As hidden states are flattened: [s, b, h] -> [s b, h].
            input_ids = part.tokens.transpose(0, 1).flatten()[part.loss_index]
            assert torch.equal(part.target_ids, input_ids + 1)
            predicted += part.target_ids.tolist()
    assert sorted(predicted) == [token for t in batch for token in t.response_ids]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_neither_prompts_nor_padding_count(layout):
    """Prompt tokens, the position after a response's last token, and padding have no loss."""
    batch = trajectories()
    for parts in micro_batches(batch, layout, fixed=True):
        members = parts[0].trajectories
        for number, member in enumerate(members):
            counts = [part.loss_counts[number] for part in parts]
            assert sum(counts) == len(member.response_ids)
        for part in parts:
            assert sum(part.loss_counts) == len(part.loss_index) == len(part.target_ids)
            padding = part.padding_mask.transpose(0, 1).flatten()
            assert not padding[part.loss_index].any()
        real = torch.cat([part.tokens[~part.padding_mask] for part in parts])
        assert sorted(real.tolist()) == sorted(token for t in members for token in t.token_ids)


def test_every_rank_gets_as_many_micro_batches(seed=0):
    """Ranks in a collective would wait forever for a micro-batch that one of them lacks."""
    rng = random.Random(seed)
    for dp_size in (1, 2, 3, 4):
        for count in (0, 1, 5, 16):
            batch = trajectories(count, rng.random())
            for layout in LAYOUTS:
                shape = BatchShape.for_batch(batch, micro_batch_size=2, cp_rank=0, fixed=True, **layout)
                shares = split_over_ranks(batch, dp_size, lambda t: t.domain)
                ranks = equalize([group_micro_batches(share, shape) for share in shares])
                assert len({len(groups) for groups in ranks}) == 1 and len(ranks[0]) >= 1
                dealt = [t.index for groups in ranks for group in groups for t in group]
                assert sorted(dealt) == list(range(count))
                shapes = {collate(group, shape).tokens.shape for groups in ranks for group in groups}
                assert len(shapes) == 1


def test_a_micro_batch_of_nothing_has_no_loss():
    shape = BatchShape.for_batch(
        trajectories(), micro_batch_size=2, max_tokens=None, tp_size=1, cp_size=1, cp_rank=0, fixed=True
    )
    empty = collate([], shape)
    assert empty.padding_mask.all() and len(empty.loss_index) == len(empty.target_ids) == 0
