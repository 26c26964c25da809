"""Tokens sampled before a run was killed are recovered and not sampled a second time."""

import gc
import hashlib
import os
import struct
import sys

import pytest
import torch

from megatron_mopd.rollout import write_ahead
from megatron_mopd.rollout.batches import DecodingBatch, Request
from megatron_mopd.rollout.write_ahead import (
    CONTINUES,
    CUT,
    STOPPED,
    Known,
    Piece,
    RolloutLog,
    decode,
    encode,
    join,
    read,
)
from tests import _models
from tests._distributed import run_ranks
from tests._traffic import received_bytes
from tests.rollout._engines import engine, plain, prompts, sampling

PIECES = [
    Piece(0, 0, (5, 6), (-0.5, -1.25), CONTINUES),
    Piece(3, 0, (7,), (-2.0,), STOPPED),
    Piece(0, 2, (8,), (-0.1,), CUT),
    Piece(4, 0, (9, 9), (-0.3, -0.4), CONTINUES),
]
WHOLE = {
    0: Known((5, 6, 8), (-0.5, -1.25, -0.1), CUT),
    3: Known((7,), (-2.0,), STOPPED),
    4: Known((9, 9), (-0.3, -0.4), CONTINUES),
}


def write(directory):
    """Write a log of three records after its header; returns the file's name, its bytes and the records'
    ends."""
    groups = _models.groups_for({})
    log = RolloutLog(directory, "weights and prompts", groups)
    ends = []
    for part in (PIECES[:2], PIECES[2:3], PIECES[3:]):
        log.append(part)
        (path,) = directory.glob("*.log")
        ends.append(path.stat().st_size)
    log.close()
    return path.name, path.read_bytes(), ends


def test_torn_and_damaged_logs_give_what_is_whole(tmp_path):
    name, data, ends = run_ranks(1, lambda rank: write(tmp_path / "log"))[0]
    path = tmp_path / "log" / name
    assert join(read(path, "weights and prompts")) == WHOLE
    assert join(read(path, "other weights")) == {}
    whole_pieces = (0, 2, 3, 4)
    for size in range(len(data)):  # torn at every byte
        path.write_bytes(data[:size])
        complete = sum(size >= end for end in ends)
        assert list(read(path, "weights and prompts")) == PIECES[: whole_pieces[complete]]
    for place in range(0, len(data), 3):  # one bit flipped
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        complete = sum(place >= end for end in ends)
        assert list(read(path, "weights and prompts")) == PIECES[: whole_pieces[complete]]
    assert list(read(tmp_path / "nowhere", "weights and prompts")) == []


def test_the_format_of_a_log_is_stable():
    """A log of an earlier release is read, so its bytes are those that earlier releases wrote."""
    payload = encode(PIECES)
    assert payload[:36] == struct.pack("<I4q", 4, 0, 0, 2, CONTINUES)
    assert hashlib.sha256(payload).hexdigest() == (
        "51a7355f693259aed9647cbd6e69865ac457d845d7fe2773a410a20ecd3d9a3d"
    )
    assert decode(payload) == PIECES


def test_pieces_of_several_starts_are_joined():
    again = [Piece(0, 1, (6, 8), (-1.25, -0.1), CUT), Piece(4, 3, (1,), (0.0,), STOPPED)]  # one after a gap
    assert join(PIECES[:2] + PIECES[3:] + again) == WHOLE
    assert join(reversed(PIECES)) == WHOLE


def test_tokens_of_damaged_weights_are_sampled_again():
    bad = [Piece(9, 0, (5, 6), (-1.0, -0.5), CONTINUES), Piece(9, 2, (7,), (float("nan"),), STOPPED)]
    assert join(PIECES + bad) == WHOLE | {9: Known((5, 6), (-1.0, -0.5), CONTINUES)}


class Killed(Exception):
    pass


def interrupted(rank, layout, directory, settings):
    """Generate without interruption; then with two kills and restarts; then from a complete log."""
    made, _ = engine(_models.MOE, layout, max_batch_size=6)
    asked, params, groups = prompts(7), sampling(**settings), made._groups
    write_ahead.FLUSH_SECONDS = 0.0
    expected = made.generate(asked, params, seed=3, samples_per_prompt=2)
    sampled, outcomes = [], []

    def log():
        return RolloutLog(directory, "same", groups)

    for budget in (5, 4, 10**6):
        left, new, opened = [budget], [], log()

        def on_token(index, token, left=left, new=new):
            new.append((index, token))
            left[0] -= 1
            if left[0] < -6 * 2:  # in the middle of a later step; the previous steps are in the log
                raise Killed

        before = sum(len(known.token_ids) for known in opened.known.values())
        complete = {i for i, known in opened.known.items() if known.is_complete}
        try:
            outcome = made.generate(
                asked, params, seed=3, samples_per_prompt=2, on_token=on_token, log=opened
            )
        except Killed:
            outcome = None
        sampled.append((before, len(new), complete & {index for index, _ in new}))
        outcomes.append(outcome)
    again = made.generate(
        asked, params, seed=3, samples_per_prompt=2, on_token=lambda *_: pytest.fail("sampled"), log=log()
    )
    return plain(expected), [o and plain(o) for o in outcomes], plain(again), sampled


@pytest.mark.parametrize("settings", [{}, {"stop_token_ids": (), "repetition_stop": 2}])
def test_an_interrupted_rollout_is_continued_token_by_token(tmp_path, settings):
    ((expected, outcomes, again, sampled),) = run_ranks(
        1, lambda rank: interrupted(rank, None, tmp_path, settings)
    )
    assert outcomes[:2] == [None, None]
    for result in (outcomes[2], again):
        for wanted, got in zip(expected, result, strict=True):
            assert got[:3] == wanted[:3] and got[4] == wanted[4]  # tokens and endings
            assert got[3] == pytest.approx(wanted[3], abs=1e-12)  # log-probs, from different batches
    assert again == outcomes[2]
    total = sum(len(response) for _, _, response, *_ in expected)
    (none, *_), (first, *_), (second, new, _) = sampled
    assert none == 0 < first < second and second + new == total  # no token was sampled twice
    assert all(not resampled for *_, resampled in sampled)


def test_a_log_on_several_ranks(tmp_path):
    """Two data-parallel ranks write one log each; a different layout reads both."""

    def generate(rank, layout, budget):
        made, _ = engine(_models.DENSE, layout)
        write_ahead.FLUSH_SECONDS = 0.0
        log, new = RolloutLog(tmp_path, "same", made._groups), []

        def on_token(index, token):
            new.append(index)
            if len(new) > budget:
                raise Killed

        try:
            result = plain(made.generate(prompts(6), sampling(), seed=3, on_token=on_token, log=log))
        except Killed:
            result = None
        return result, len(new), sum(len(known.token_ids) for known in log.known.values())

    expected = run_ranks(
        1, lambda rank: plain(engine(_models.DENSE)[0].generate(prompts(6), sampling(), seed=3))
    )
    first = run_ranks(2, lambda rank: generate(rank, {}, 8))
    assert [result for result, *_ in first] == [None, None] and len(os.listdir(tmp_path)) == 2
    second = run_ranks(2, lambda rank: generate(rank, {"tensor_model_parallel_size": 2}, 10**6))
    for result, new, known in second:
        assert [got[:3] for got in result] == [wanted[:3] for wanted in expected[0]]
        assert known > 8 and known + new == sum(len(response) for _, _, response, *_ in result)


def resumed(rank, layout, directory):
    """What this rank knows from a log before and after it was continued, and the bytes it received then."""
    made, _ = engine(_models.DENSE, layout)
    groups = made._groups
    log = RolloutLog(directory, "same", groups)
    facts = [(i, known.length, known.state) for i, known in log.known.items()]
    before = sum(known.token_ids is not None for known in log.known.values())
    with received_bytes() as received:
        log.deliver({i: i % groups.dp_size for i in log.known})
    held = [i for i, known in log.known.items() if known.token_ids is not None]
    tokens = [log.known[i].token_ids.tolist() for i in held]
    log = RolloutLog(directory, "same", groups)
    result = plain(made.generate(prompts(6), sampling(), seed=3, log=log))
    return facts, before, groups.dp.rank(), held, tokens, sum(received), result


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=str)
def test_a_logs_tokens_are_sent_only_to_the_ranks_that_continue_them(tmp_path, layout):
    def interrupt(rank):
        made, _ = engine(_models.DENSE)
        write_ahead.FLUSH_SECONDS, new = 0.0, []

        def on_token(index, token):
            new.append(index)
            if len(new) > 30:
                raise Killed

        log = RolloutLog(tmp_path, "same", made._groups)
        with pytest.raises(Killed):
            made.generate(prompts(6), sampling(), seed=3, on_token=on_token, log=log)
        known = RolloutLog(tmp_path, "same", made._groups).known
        return {index: part.token_ids.tolist() for index, part in known.items()}

    (stored,) = run_ranks(1, interrupt)
    expected = run_ranks(
        1, lambda rank: plain(engine(_models.DENSE)[0].generate(prompts(6), sampling(), seed=3))
    )[0]
    assert len(stored) == 6
    results = run_ranks(4, resumed, layout, tmp_path)
    size = 2 if layout else 4
    for rank, (facts, before, dp_rank, held, tokens, received, result) in enumerate(results):
        assert [(i, length) for i, length, _ in facts] == [(i, len(ids)) for i, ids in stored.items()]
        assert before == (6 if rank == 0 else 0)
        assert held == [i for i in range(6) if i % size == dp_rank]
        assert tokens == [stored[i] for i in held]
        assert received <= 12 * sum(map(len, tokens)), "a rank receives other ranks' tokens"
        assert [got[:3] for got in result] == [wanted[:3] for wanted in expected]


def blocks_of_a_decoding_batch(rank, steps):
    """Objects (blocks of Python's allocator) that the results of a batch of six rows of `steps` tokens keep:
    its responses, what is logged of them, and the same read again."""
    requests = [Request(i, (5, 6), steps) for i in range(6)]
    batch = DecodingBatch(requests, sampling(max_new_tokens=steps, stop_token_ids=()), torch.device("cpu"))
    while not batch.advance(torch.randint(300, 1000, (6,)), torch.rand(6).double()):
        pass
    kept = None
    for _ in range(2):  # the first time fills caches
        kept = None
        gc.collect()
        before = sys.getallocatedblocks()
        pieces = batch.unlogged()
        batch._logged.zero_()
        kept = batch.responses(), pieces, join(decode(encode(pieces)))
        gc.collect()
    assert {len(response.token_ids) for response in kept[0]} == {steps}
    assert {known.length for known in kept[2].values()} == {steps} and len(kept[2]) == 6
    return sys.getallocatedblocks() - before


def test_results_have_no_object_per_token():
    short, long = (run_ranks(1, blocks_of_a_decoding_batch, steps)[0] for steps in (20, 400))
    assert 0 < short and long - short < 100, "6 x 380 more tokens"
