"""Micro-batches: which hidden state predicts which token, which tokens count in the loss, and their
lengths."""

import random

import pytest
import torch

from megatron_mopd.data.batching import LENGTHS_PER_OCTAVE, BatchShape, collate
from megatron_mopd.data.division import Division
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


def micro_batches(batch, layout):
    """The micro-batches of every context-parallel rank, one list for each micro-batch."""
    shapes = [
        BatchShape.for_batch(batch, micro_batch_size=3, cp_rank=rank, **layout)
        for rank in range(layout["cp_size"])
    ]
    cut = Division(batch, 1, shapes[0], lambda t: t.domain).cut()
    return [[collate(members, shape) for shape in shapes] for members in cut.of_rank(0)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_hidden_state_predicts_the_token_after_it(layout):
    """Without this shift a model learns to copy. Ids are consecutive, so the next token is one higher."""
    batch = trajectories()
    predicted = []
    for parts in micro_batches(batch, layout):
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
    for parts in micro_batches(batch, layout):
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


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_micro_batches_are_as_long_as_their_content(layout):
    """Rounded up to one of a few lengths that TP and CP can split."""
    rng = random.Random(3)
    alignment = layout["tp_size"] * (2 * layout["cp_size"] if layout["cp_size"] > 1 else 1)
    found = set()
    for _ in range(200):
        batch = [trajectory(0, [1], [2] * rng.randint(1, 20_000), "a")]
        shape = BatchShape.for_batch(batch, micro_batch_size=3, cp_rank=0, **layout)
        rows, length = shape.rows_and_length(batch)
        assert (
            rows == 1
            and length % alignment == 0
            and collate(batch, shape).tokens.shape
            == (
                1,
                length // layout["cp_size"],
            )
        )
        assert len(batch[0]) <= length <= len(batch[0]) * (1 + 1 / LENGTHS_PER_OCTAVE) + alignment
        found.add(length)
    # Packed, the longest trajectory is the budget, which is not rounded up.
    assert layout["max_tokens"] or len(found) <= 6 * LENGTHS_PER_OCTAVE


def test_a_micro_batch_of_nothing_has_no_loss():
    shape = BatchShape.for_batch(
        trajectories(), micro_batch_size=2, max_tokens=None, tp_size=1, cp_size=1, cp_rank=0
    )
    empty = collate([], shape)
    assert empty.padding_mask.all() and len(empty.loss_index) == len(empty.target_ids) == 0
