"""Tokens are drawn from exactly the specified distribution, however the vocabulary is sharded."""

import math

import pytest
import torch

from megatron_mopd.objectives.vocab_shard import VocabShard
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.rollout.noise import gumbel_noise
from megatron_mopd.rollout.sampling import sample_tokens
from tests._distributed import run_ranks

LOGITS = torch.tensor([1.3, -0.2, 2.0, 0.1, -1.5, 1.1, 0.4])
DRAWS = 40_000


def draw(logits, shard, seed=3, position=0, first=0, **params):
    params = SamplingParams(max_new_tokens=1, **params)
    rows = torch.arange(first, first + len(logits))
    return sample_tokens(logits, shard, params, seed=seed, trajectories=rows, position=position)


def exact(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution by definition, in fp64, one token at a time."""
    weights = [math.exp(x / temperature) for x in logits.double().tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    order = order[: top_k or None]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return torch.tensor([weights[i] / total if i in kept else 0.0 for i in range(len(weights))])


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.75},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.8},
    ],
    ids=str,
)
def test_frequencies_and_logprobs_are_those_of_the_exact_distribution(params):
    shard = VocabShard.of(len(LOGITS), None, None)
    tokens, logprobs = draw(LOGITS.expand(DRAWS, -1), shard, **params)
    probabilities = exact(LOGITS, **params)
    counts = torch.bincount(tokens, minlength=len(LOGITS)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = DRAWS * probabilities[possible].double()
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum()
    # At most 6 degrees of freedom: 27.9 has probability 1e-4. A wrong temperature or cutoff gives thousands.
    assert chi_square < 27.9, chi_square
    torch.testing.assert_close(logprobs.float(), probabilities[tokens].log(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("vocabulary", [1023, 1024, 1025, 1536, 5000])
def test_greedy_finds_the_largest_logit_of_many(vocabulary):
    """At any position, and the first of equal ones: long rows are searched in blocks."""
    generator = torch.Generator().manual_seed(vocabulary)
    for logits in (
        torch.randn(vocabulary, vocabulary, generator=generator) + 9 * torch.eye(vocabulary),  # everywhere
        torch.randint(0, 3, (50, vocabulary), generator=generator).float(),
        torch.full((3, vocabulary), -torch.inf).index_fill_(1, torch.tensor([vocabulary - 1]), 1.0),
    ):
        ids, logprobs = sample_tokens(
            logits,
            VocabShard.of(vocabulary, None, vocabulary),
            SamplingParams(1, temperature=0.0),
            seed=0,
            trajectories=torch.arange(len(logits)),
            position=0,
        )
        assert torch.equal(ids, (logits == logits.amax(dim=1, keepdim=True)).int().argmax(dim=1))
        exact = logits.double().log_softmax(dim=1).gather(1, ids.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(logprobs, exact, rtol=0, atol=1e-5)


def test_greedy_takes_the_largest_logit_and_reports_its_logprob_at_temperature_one():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw(logits, VocabShard.of(30, None, 27), temperature=0.0)
    assert torch.equal(tokens, logits[:, :27].argmax(dim=1))
    expected = logits[:, :27].log_softmax(dim=1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs.float(), expected)


VOCAB, PADDED = 300, 512  # at TP 4 the third shard is partly and the fourth entirely padding
CASES = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3, "top_p": 0.9},
    {"top_p": 0.97},  # needs more than the first candidates
    {"top_p": 0.62},  # the first candidates suffice, although one shard holds more of the nucleus
    {"top_k": 9},
    {"top_k": 400, "top_p": 0.5},
]


def sharded_logits():
    logits = torch.randn(64, PADDED, generator=torch.Generator().manual_seed(1)) * 1.5
    logits[32:] = 2.0 - torch.arange(PADDED) / 1e4
    logits[32:, :100] += 3.0  # one shard holds more of the nucleus than the first candidates
    logits[:, VOCAB:] = 50.0  # padding that would always be drawn if it counted
    return logits


def draw_shard(rank, size):
    columns = PADDED // size
    group = torch.distributed.group.WORLD
    local = sharded_logits()[:, rank * columns : (rank + 1) * columns]
    return [draw(local, VocabShard.of(columns, group, VOCAB), **case) for case in CASES]


@pytest.mark.parametrize("size", [2, 4])
def test_shards_draw_what_one_rank_draws(size):
    ranks = run_ranks(size, draw_shard, size)
    for number, case in enumerate(CASES):
        tokens, logprobs = draw(sharded_logits(), VocabShard.of(PADDED, None, VOCAB), **case)
        if case.get("temperature") != 0.0:
            probabilities = torch.stack([exact(row, **case) for row in sharded_logits()[:, :VOCAB]])
            expected = probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1).log()
            torch.testing.assert_close(logprobs.float(), expected, rtol=0, atol=3e-6)
        for results in ranks:
            assert torch.equal(results[number][0], tokens), case
            torch.testing.assert_close(results[number][1].double(), logprobs.double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.0}, {"top_p": 0.75}, {"top_k": 3, "top_p": 0.5}], ids=str
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_a_token_whose_logprob_says_so(params, value):
    """The trainer skips such a step; an index outside the vocabulary would crash the run before."""
    logits = LOGITS.expand(4, -1).clone()
    logits[1, 2] = value
    logits[2] = value
    tokens, logprobs = draw(logits, VocabShard.of(len(LOGITS), None, None), **params)
    assert torch.isfinite(logprobs).tolist() == [True, False, False, True]
    assert ((tokens >= 0) & (tokens < len(LOGITS))).all()


def test_noise_is_a_function_of_its_four_keys_alone():
    rows = torch.tensor([5, 900_000_000_000, 7])
    whole = gumbel_noise(11, rows, 4, 0, 1000)
    assert torch.equal(gumbel_noise(11, rows.flip(0), 4, 0, 1000), whole.flip(0))
    assert torch.equal(gumbel_noise(11, rows[1:2], 4, 700, 300), whole[1:2, 700:])
    others = [
        gumbel_noise(12, rows, 4, 0, 1000),
        gumbel_noise(11, rows, 5, 0, 1000),
        whole.roll(1, 0),
        whole.roll(1, 1),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack((whole.flatten(), other.flatten())))[0, 1]) < 0.07


def test_noise_is_gumbel_and_neighbouring_keys_are_independent():
    noise = torch.stack(
        [gumbel_noise(s, torch.arange(64), p, 0, 256) for s in (0, 1) for p in range(16)]
    ).double()
    assert torch.isfinite(noise).all()
    count = noise.numel()  # 524 288
    assert abs(noise.mean() - 0.5772156649) < 5 * (math.pi**2 / 6 / count) ** 0.5
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    # Kolmogorov-Smirnov distance of exp(-exp(-g)) from uniform: 1.95 / sqrt(n) has probability 1e-3.
    uniform = (-(-noise).exp()).exp().flatten().sort().values
    assert (uniform - torch.arange(1, count + 1) / count).abs().max() < 1.95 / count**0.5
    centred = (noise - noise.mean()) / noise.std()
    for dim in range(3):  # (seed, position), trajectory, vocabulary id
        for lag in (1, 2, 4):
            pairs = centred.narrow(dim, lag, centred.size(dim) - lag) * centred.narrow(
                dim, 0, centred.size(dim) - lag
            )
            assert abs(pairs.mean()) < 5 / pairs.numel() ** 0.5, (dim, lag)


def test_noise_never_overflows_at_the_ends_of_its_range():
    from megatron_mopd.rollout import noise as module

    for bits in (0, 0x7FFFFFFF, -1):
        fake = lambda x, bits=bits: torch.full_like(x, bits)  # noqa: E731
        original, module._mix_32_ = module._mix_32_, fake
        try:
            assert torch.isfinite(gumbel_noise(0, torch.arange(2), 0, 0, 3)).all()
        finally:
            module._mix_32_ = original


@pytest.mark.parametrize(
    "params",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"temperature": math.nan}],
)
def test_impossible_parameters_are_refused(params):
    with pytest.raises(ValueError, match="temperature"):
        SamplingParams(max_new_tokens=1, **params)
    with pytest.raises(ValueError, match="max_new_tokens"):
        SamplingParams(max_new_tokens=0)
