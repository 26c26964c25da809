"""Ownership of buffers while teachers arrive: a delay at any hand-over changes no byte."""

from __future__ import annotations

import time
from itertools import product
from typing import get_args

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.choices import StorageMode
from megatron_mopd.config import TeacherStorageConfig
from megatron_mopd.teachers.arrivals import Arrivals
from megatron_mopd.teachers.bank import TeacherBank, TeacherSource
from tests import _models
from tests._distributed import RankPool

PLACES = ("before issuing", "issued", "landed", "decoded", "started", "arrived")
DELAY = 0.002
MODELS = [model | dict(num_layers=1) for model in (_models.MOE, _models.DENSE)]
PAIRS = [("t0", "t1"), ("t2", "t3"), ("t1", "t0")]


class SlowArrivals(Arrivals):
    """The bank's arrivals with a delay at one place of every arrival. Counts marks, and records the mark that
    each arrival waits for."""

    def __init__(self, arrivals):
        self.arrivals, self.place, self.marks, self.waited_for = arrivals, "", 0, []

    def pause(self, place):
        if place == self.place:
            time.sleep(DELAY)

    def start(self, beginnings, finish, free):
        self.waited_for.append(free)

        def slow(begin):
            self.pause("before issuing")
            rest = begin()
            self.pause("issued")
            return rest

        def slow_finish():
            self.pause("landed")
            finish()
            self.pause("decoded")

        arrival = self.arrivals.start([lambda b=b: slow(b) for b in beginnings], slow_finish, None)
        self.pause("started")
        return arrival

    def mark(self):
        self.marks += 1
        return self.marks

    def close(self):
        self.arrivals.close()


def make_bank(groups, **storage):
    sources = [
        TeacherSource(f"t{number}", _models.model_config(MODELS[number % 2]), number, f"seed {number}")
        for number in range(4)
    ]
    directory = storage.pop("directory", "unused")
    return TeacherBank(
        sources, groups, "float32", 64, TeacherStorageConfig(**storage), directory, max_mixture=2
    )


def contents(bank, name):
    """Copies of a teacher's weights and head in the slots."""
    body = {key: p.detach().clone() for key, p in bank.make_resident(name).named_parameters() if p.numel()}
    return body | {"head": bank.head(name).clone()}


def with_delays(rank, mode, dtype, directory):
    """Tensors that differ from a bank in which one teacher arrives at a time without delays."""
    groups = _models.groups_for({})
    quiet = make_bank(groups, mode="host", dtype=dtype)
    expected = {name: contents(quiet, name) for name in quiet.names}
    bank = make_bank(groups, mode=mode, dtype=dtype, directory=directory)
    bank._arrivals = slow = SlowArrivals(bank._arrivals)
    wrong = []
    for place, who in product(PLACES, ("all ranks", "one rank")):
        slow.place = place if who == "all ranks" or rank == 1 else ""
        for pair in PAIRS:
            for slot, name in enumerate(pair):  # as in a plan: the second while the first is in flight
                bank.prefetch(name, slot)
                bank.prefetch_head(name, slot)
            for name in pair:
                bank.make_resident(name)
                slow.pause("arrived")
                found = contents(bank, name)
                wrong += [
                    (place, who, name, key)
                    for key, value in expected[name].items()
                    if not torch.equal(value, found[key])
                ]
    bank.close()
    return wrong


@pytest.fixture(scope="module")
def pool():
    with RankPool(2, timeout=120) as ranks:
        yield ranks


@pytest.mark.parametrize("dtype", [None, "int8", "fp8"])
@pytest.mark.parametrize("mode", get_args(StorageMode))
def test_delays_change_no_byte(pool, tmp_path, mode, dtype):
    assert pool.run(with_delays, mode, dtype, str(tmp_path)) == [[], []]


def first_marks(rank):
    """Number of marks when fresh slots are reserved, and the marks that arrivals in them wait for."""
    bank = make_bank(_models.groups_for({}), mode="host", dtype="int8")
    slow = SlowArrivals(bank._arrivals)
    bank._arrivals = slow
    bank.reserve_heads(8)
    made = slow.marks
    bank.prefetch_head("t3", 7)
    bank.close()
    return made, slow.waited_for


def test_an_arrival_in_a_new_slot_waits_until_its_memory_is_cleared(pool):
    """On CUDA, the caller's stream may still be writing zeros when the arrival's stream could begin."""
    made, waited_for = pool.run(first_marks)[0]
    assert made == 5 and waited_for == [made]
