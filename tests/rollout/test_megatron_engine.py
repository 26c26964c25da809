"""The engine's samples against full forward passes without a cache on one rank."""

import pytest
import torch

from megatron_mopd.model.router_replay import install_routing_replay
from megatron_mopd.rollout import batches, decoder
from megatron_mopd.rollout.batches import DecodingBatch, Request, _shared_length
from megatron_mopd.rollout.noise import gumbel_noise
from tests import _models
from tests._distributed import run_ranks
from tests.model.test_latent_attention import MLA
from tests.rollout import _engines
from tests.rollout._engines import engine, plain, prompts, sampling

VOCAB = _models.VOCAB


def run_one(function, *args):
    return run_ranks(1, function, *args)[0]


def full_logits(chunk, trajectory) -> torch.Tensor:
    """Logits that predict each response token, from one training forward pass over the whole document."""
    tokens = torch.tensor([trajectory.token_ids.tolist()])
    hidden = chunk(tokens, torch.arange(tokens.size(1)).unsqueeze(0), None)
    logits = hidden[:, 0] @ chunk.head_weight().t()
    start = len(trajectory.prompt.token_ids) - 1
    return logits[start : start + len(trajectory.response_ids), :VOCAB]


def against_full_forward(rank, transformer, tie, packed):
    """Per temperature: largest difference of log-probs, tokens that are not argmax(logits + noise), tokens.
    Prompts share a prefix only for greedy sampling."""
    dtype = "float32" if packed else "float64"  # only float32 weights can be packed
    made, chunks = engine(transformer, dtype=dtype, share_embeddings_and_output_weights=tie)
    results = []
    if packed:
        _engines.pack_everything()
    for temperature in (0.0, 1.0, 0.6):
        worst, wrong, count = 0.0, 0, 0
        asked = prompts(longest=7, common=10) if temperature == 0 else prompts()
        samples = made.generate(asked, sampling(temperature=temperature), seed=21, samples_per_prompt=2)
        for trajectory in samples:
            logits = full_logits(chunks[0], trajectory)
            assert logits.requires_grad  # from a training forward pass, not from the engine
            scaled = logits / (temperature or 1.0)
            tokens = torch.tensor(trajectory.response_ids.tolist())
            logprobs = scaled.log_softmax(dim=1).gather(1, tokens.unsqueeze(1)).squeeze(1)
            worst = max(worst, float((logprobs - torch.tensor(trajectory.logprobs)).abs().max()))
            index = torch.tensor([trajectory.index])
            noise = torch.cat([gumbel_noise(21, index, t, 0, VOCAB) for t in range(len(tokens))])
            expected = (scaled if temperature == 0 else scaled + noise).argmax(dim=1)
            wrong += int((expected != tokens).sum())
            count += len(tokens)
        results.append((worst, wrong, count))
    return results


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("transformer", ["DENSE", "GQA", "MOE", "SHARED", "MLA"])
def test_decoding_with_a_cache_equals_full_forward_passes(transformer, packed):
    architecture = MLA if transformer == "MLA" else getattr(_models, transformer)
    for worst, wrong, count in run_one(against_full_forward, architecture, transformer == "GQA", packed):
        assert count > 50 and wrong == 0
        assert worst < (3e-5 if packed else 1e-5)  # float32 rounding measured 1.1e-5


def new_weights(rank):
    """Greedy responses before and after the weights change, with and without packed weights."""
    made, chunks = engine(_models.MOE, dtype="float32")
    results = []
    for packed in (True, False, True, False):
        _engines.pack_everything(packed)
        results.append(plain(made.generate(prompts(), sampling(temperature=0.0), seed=5)))
        if len(results) == 2:
            with torch.no_grad():
                for parameter in chunks[0].parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return results


def test_packed_weights_are_those_of_the_moment():
    before, before_plain, after, after_plain = run_one(new_weights)
    tokens = [[row[2] for row in rows] for rows in (before, before_plain, after, after_plain)]
    assert tokens[0] == tokens[1] and tokens[2] == tokens[3] and tokens[0] != tokens[2]
    for (*_, logprobs, _), (*_, expected, _) in zip(before + after, before_plain + after_plain):
        assert logprobs == pytest.approx(expected, abs=3e-5)


def counted(rank):
    """(complete responses, all responses) of every progress update."""
    told = []
    decoder.advance = lambda done, total: told.append((done, total))
    made, _ = engine(_models.DENSE, max_batch_size=4)
    made.generate(prompts(6), sampling(max_new_tokens=9), seed=5, samples_per_prompt=2)
    return told


def test_progress_counts_complete_responses():
    told = run_one(counted)
    assert {total for _, total in told} == {12}
    done = [count for count, _ in told]
    assert done[0] == 0 and done[-1] == 12 and done == sorted(done)
    assert len(set(done)) > 4, "no updates within the three batches"


def variants(rank):
    made, _ = engine(_models.MOE)
    base = made.generate(prompts(), sampling(), seed=5, samples_per_prompt=3)
    tiny, _ = engine(_models.MOE, max_batch_size=4)
    return {
        "base": plain(base),
        "again": plain(made.generate(prompts(), sampling(), seed=5, samples_per_prompt=3)),
        "other seed": plain(made.generate(prompts(), sampling(), seed=6, samples_per_prompt=3)),
        "tiny batches": plain(tiny.generate(prompts(), sampling(), seed=5, samples_per_prompt=3)),
        "fewer prompts": plain(made.generate(prompts()[:4], sampling(), seed=5, samples_per_prompt=3)),
        "never stops": plain(
            made.generate(prompts(), sampling(stop_token_ids=()), seed=5, samples_per_prompt=3)
        ),
        "nothing": made.generate([], sampling(), seed=5),
    }


@pytest.fixture(scope="module")
def results():
    return run_one(variants)


def test_tokens_follow_from_seed_and_index_alone(results):
    base = results["base"]
    assert [(index, prompt) for index, prompt, *_ in base] == [(i, i // 3) for i in range(27)]
    assert results["again"] == base
    assert results["nothing"] == []
    for name in ("tiny batches", "fewer prompts"):
        for got, expected in zip(results[name], base):
            assert got[:3] == expected[:3] and got[4] == expected[4]
            assert got[3] == pytest.approx(expected[3], abs=1e-9)
    responses = [response for _, _, response, *_ in base]
    assert sum(a != b for a, b in zip(responses, (r[2] for r in results["other seed"]))) > 20
    samples = [responses[3 * p : 3 * p + 3] for p in range(9)]
    assert sum(len(set(three)) == 3 for three in samples) > 6


def test_a_response_ends_with_its_first_stop_token_or_at_the_limit(results):
    endings = set()
    for (*_, response, _, finished), (*_, unstopped, _, ended) in zip(
        results["base"], results["never stops"]
    ):
        assert len(unstopped) == 10 and ended is False
        stops = [t for t, token in enumerate(unstopped) if token in _engines.STOPS]
        expected = unstopped[: stops[0] + 1] if stops else unstopped
        assert response == expected and finished == bool(stops)
        endings.add((finished, len(response)))
    assert (False, 10) in endings and len(endings) > 4  # both ways to end, at different lengths


def observe_batches(rank, samples_per_prompt):
    made, chunks = engine(_models.GQA)
    shapes = []
    chunks[0].register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    return shapes, plain(
        made.generate(prompts(12), sampling(), seed=5, samples_per_prompt=samples_per_prompt)
    )


@pytest.mark.parametrize("samples_per_prompt", [1, 4])
def test_a_prompt_is_read_once_and_finished_rows_leave_the_batch(samples_per_prompt):
    shapes, trajectories = run_one(observe_batches, samples_per_prompt)
    assert shapes[0] == (1, sum(len(prompt.token_ids) for prompt in prompts(12)))
    lengths = [len(response) for _, _, response, *_ in trajectories]
    for step, (rows, new) in enumerate(shapes[1:], start=1):
        alive = sum(length > step for length in lengths)
        assert new == 1 and alive <= rows <= alive * 8 / 7
    assert len(shapes) == max(lengths) and shapes[-1][0] < 12 * samples_per_prompt / 2


def test_prompts_are_packed_and_their_rows_end_at_one_column():
    requests = [Request(4, (11, 12, 13), 5), Request(5, (14,), 5), Request(6, (14,), 5)]
    batch = DecodingBatch(requests, sampling(), torch.device("cpu"))
    assert batch.input_ids.tolist() == [[11, 12, 13, 14]] and batch.documents.lengths == (3, 1)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0]] and batch.attention_mask() is None
    hidden = torch.arange(4.0).view(4, 1, 1)
    assert batch.expand(batch.sampled_states(hidden)).flatten().tolist() == [2, 3, 3]
    assert batch.trajectories.tolist() == [4, 5, 6] and batch.samples == 3
    assert batch.advance(torch.tensor([20, 3, 21]), torch.zeros(3).double()) is False  # 3 is a stop token
    assert batch.trajectories.tolist() == [4, 6]
    assert batch.input_ids.tolist() == [[20], [21]] and batch.position_ids.tolist() == [[3], [1]]
    assert (~batch.attention_mask()).long().tolist() == [[[[1, 1, 1, 1]]], [[[0, 0, 1, 1]]]]
    assert batch.advance(torch.tensor([22, 4]), torch.zeros(2).double()) is False
    assert batch.trajectories.tolist() == [4]


def test_what_all_prompts_begin_with_is_read_once():
    begin = tuple(range(20, 30))
    asked = [(*begin, 1, 2, 3), (*begin, 4), (*begin, 4), (*begin, 1, 5)]
    batch = DecodingBatch([Request(i, p, 5) for i, p in enumerate(asked)], sampling(), torch.device("cpu"))
    assert batch.input_ids.tolist() == [[*begin, 1, 2, 3, 4, 1, 5]]
    assert batch.position_ids.tolist() == [[*range(10), 10, 11, 12, 10, 10, 11]]
    assert batch.documents.lengths == (10, 3, 1, 2) and batch.documents.shared == 10
    hidden = torch.arange(16.0).view(16, 1, 1)
    assert batch.expand(batch.sampled_states(hidden)).flatten().tolist() == [12, 13, 13, 15]
    batch.advance(torch.tensor([20, 21, 3, 22]), torch.zeros(4).double())  # 3 is a stop token
    assert batch.position_ids.tolist() == [[13], [11], [12]]
    assert (~batch.attention_mask()).long().sum(dim=3).flatten().tolist() == [14, 12, 13]


@pytest.mark.parametrize(
    "asked, length",
    [
        ([(*range(9), 1), (*range(9), 2), (*range(9), 1, 3)], 9),
        ([tuple(range(9)), tuple(range(12))], 8),  # every prompt keeps one token that is not shared
        ([tuple(range(8)), tuple(range(12))], 0),  # 7 tokens are too few to share
        ([(1, *range(20)), (2, *range(20))], 0),
        ([tuple(range(20))], 0),
    ],
    ids=str,
)
def test_how_much_is_shared(asked, length):
    assert _shared_length(asked) == length


def routes(rank, sharing):
    if not sharing:
        batches._SHORTEST_SHARED = 1000
    made, chunks = engine(_models.MOE)
    install_routing_replay(chunks)
    made.generate(prompts(longest=7, common=10), sampling(keep_routing=True), seed=5, samples_per_prompt=2)
    return {index: experts.tolist() for index, experts in made.routing.records.items()}


def test_expert_choices_of_shared_tokens_belong_to_every_prompt():
    shared, alone = run_one(routes, True), run_one(routes, False)
    assert len(shared) == 18 and shared == alone


def refuse(rank):
    made, _ = engine(_models.DENSE, max_sequence_length=16)
    messages = []
    for prompt in (prompts(1, 16, 16), prompts(1, 17, 17)):
        with pytest.raises(ValueError) as caught:
            made.generate(prompt, sampling(), seed=0)
        messages.append(str(caught.value))
    return messages, plain(made.generate(prompts(3, 12, 15), sampling(stop_token_ids=()), seed=0))


def test_sequence_length_bounds_prompt_plus_response():
    messages, trajectories = run_one(refuse)
    assert all("p0" in message and "15" in message for message in messages)
    lengths = [len(prompt.token_ids) for prompt in prompts(3, 12, 15)]
    assert lengths[:2] == [12, 15]
    assert [len(response) for _, _, response, *_ in trajectories] == [16 - length for length in lengths]
    assert not any(finished for *_, finished in trajectories)


def damage(rank):
    made, chunks = engine(_models.DENSE)
    with torch.no_grad():
        chunks[0].decoder.layers[1].mlp.linear_fc1.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        made.generate(prompts(), sampling(), seed=0)


def test_damaged_weights_are_an_error_not_tokens():
    run_one(damage)
