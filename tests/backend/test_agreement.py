"""Agreement between ranks: one small collective if they agree, otherwise one message on all of them."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_mopd.backend import agreement
from megatron_mopd.backend.agreement import Fact, Problem, first_problem, require_agreement
from megatron_mopd.config import ConfigError
from tests._distributed import RankPool


def facts(**values) -> list[Fact]:
    return [Fact(name, value, f"<{value}>", "mend it") for name, value in values.items()]


def counted(collective, sent):
    def wrapper(first, *args, **kwargs):
        payload = args[0] if collective.__name__ == "all_gather" else first
        sent.append((collective.__name__, getattr(payload, "nbytes", None)))
        return collective(first, *args, **kwargs)

    return wrapper


def answer(rank, by_rank, errors):
    """A rank's error message or `None`, and (collective, bytes that this rank sends) of every collective."""
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "broadcast_object_list"):
            patch.setattr(dist, name, counted(getattr(dist, name), sent))
        patch.setattr(agreement.socket, "gethostname", lambda: f"host-{rank // 2}")
        error = ConfigError(errors[rank]) if errors.get(rank) else None
        try:
            require_agreement(facts(**by_rank.get(rank, by_rank[None])), error)
        except ConfigError as refused:
            return str(refused), sent
    return None, sent


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


def told(pool, by_rank, errors=None):
    answers = pool.run(answer, by_rank, errors or {})
    (message,) = {message for message, _ in answers}
    return message, answers[0][1]


def test_ranks_that_agree_send_sixteen_bytes(pool):
    message, sent = told(pool, {None: {"torch": "2.9", "lr": "0.1"}})
    assert message is None and sent == [("all_reduce", 16)]


def test_the_first_difference_is_named_with_values_and_ranks(pool):
    same = {"torch": "2.9", "lr": "0.1", "seed": "1"}
    message, sent = told(pool, {None: same, 2: same | {"lr": "0.2", "seed": "2"}})
    assert message == "ranks differ in lr: <0.1> on ranks 0-1, 3 (host-0), <0.2> on rank 2 (host-1); mend it"
    assert [name for name, _ in sent] == [
        "all_reduce", "all_gather", "broadcast_object_list", "broadcast_object_list", "all_gather",
    ]  # fmt: skip
    assert [size for name, size in sent if name == "all_gather"] == [8, 8], "bytes per rank for any facts"
    # Two ranks differ in different facts: the message names the first rank's, and the ranks of each value.
    message, _ = told(pool, {None: same, 1: same | {"seed": "2"}, 3: same | {"torch": "2.10"}})
    assert message == "ranks differ in seed: <1> on ranks 0, 2-3, <2> on rank 1; mend it"
    # Rank 0 is the odd one out.
    message, _ = told(pool, {None: same, 0: same | {"lr": "0.2"}})
    assert message == "ranks differ in lr: <0.2> on rank 0, <0.1> on ranks 1-3; mend it"


def test_what_one_rank_lacks(pool):
    message, _ = told(pool, {None: {"lr": "0.1", "more": "x"}, 1: {"lr": "0.1"}})
    assert message == "ranks differ in more: <x> on ranks 0, 2-3, nothing on rank 1; mend it"


def test_errors(pool):
    """An error on all ranks is reported as it is, one on some ranks with those ranks, and differing settings
    before either."""
    whole, part = {"lr": "0.1", "prompts": "x"}, {"lr": "0.1"}
    message, sent = told(pool, {None: part}, dict.fromkeys(range(4), "a.yaml: wrong"))
    assert message == "a.yaml: wrong" and sent == [("all_reduce", 16)]
    message, _ = told(pool, {None: whole, 2: part}, {2: "p.jsonl: not found"})
    assert message == "p.jsonl: not found (on rank 2 (host-1))"
    message, _ = told(
        pool, {None: part, 0: whole, 3: whole}, {1: "p.jsonl: not found", 2: "p.jsonl: not found"}
    )
    assert message == "p.jsonl: not found (on ranks 1-2)"
    message, _ = told(pool, {None: whole, 2: {"lr": "0.2"}}, {2: "p.jsonl: not found"})
    assert message.startswith("ranks differ in lr: ")


def test_long_and_hostile_values(pool):
    message, _ = told(pool, {None: {"a\x1b[2J": "x" * 1000}, 1: {"a\x1b[2J": "\x1b[2J\n"}})
    assert "\x1b" not in message and "\n" not in message and len(message) < 250


@pytest.mark.parametrize(
    "ranks, expected",
    [
        ([3], "rank 3"),
        ([0, 1, 2], "ranks 0-2"),
        ([0, 2, 3, 9], "ranks 0, 2-3, 9"),
        (range(0, 4096, 2), "ranks 0, 2, 4, 6, 8, 10, ..."),
    ],
)
def test_names_of_ranks(ranks, expected):
    assert agreement.ranks_text(list(ranks)) == expected


def first(rank, texts):
    """What a rank is told, and (collective, bytes that it sends) of every collective."""
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "broadcast_object_list"):
            patch.setattr(dist, name, counted(getattr(dist, name), sent))
        return first_problem(texts.get(rank)), sent


def test_without_a_problem_ranks_send_eight_bytes(pool):
    assert pool.run(first, {}) == [(None, [("all_reduce", 8)])] * 4


def test_all_ranks_are_told_the_first_problem(pool):
    answers = pool.run(first, {3: "disk full", 1: "no such file"})
    assert [told for told, _ in answers] == [Problem("no such file", rank=1, count=2)] * 4
    assert pool.run(first, {0: ""})[2][0] == Problem("", rank=0, count=1)
