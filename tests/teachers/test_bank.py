"""The bank's slots, heads and arrivals; teacher files that disappear; hosts with too little memory."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.config import ConfigError, TeacherStorageConfig
from megatron_mopd.model.build import build_model
from megatron_mopd.teachers import placement
from megatron_mopd.teachers.bank import TeacherBank, TeacherSource
from megatron_mopd.teachers.storage import TeacherFileError
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool
from tests._models import DENSE, MOE

WIDE = DENSE | dict(num_layers=2, hidden_size=48)
TIED = DENSE | dict(num_layers=2)


@pytest.fixture(scope="module")
def pool():
    with RankPool(1, timeout=120) as rank:
        yield rank


@pytest.fixture(scope="module")
def two():
    with RankPool(2, timeout=120) as ranks:
        yield ranks


def sources(count, transformers=(DENSE, MOE, WIDE, TIED)):
    result = []
    for number in range(count):
        transformer = transformers[number % len(transformers)]
        model = _models.model_config(transformer, share_embeddings_and_output_weights=transformer is TIED)
        result.append(TeacherSource(f"t{number}", model, number, f"seed {number}"))
    return result


def bank_of(count, groups=None, **arguments):
    groups = groups or _models.groups_for({})
    storage = TeacherStorageConfig(**arguments.pop("storage", {}))
    return TeacherBank(sources(count), groups, "float32", 64, storage, **arguments)


def weights(source, groups):
    """(parameters, head) of a teacher that is built without a bank."""
    (chunk,) = build_model(
        source.model, groups, "float32", max_sequence_length=64, seed=source.seed, frozen=True
    )
    return dict(chunk.named_parameters()), chunk.head_weight()


def gated(bank):
    """An event that releases arrivals, and one that is set when an arrival waits for it."""
    begin, gate, waiting = bank.store.begin, threading.Event(), threading.Event()

    def held(key, destination):
        rest = begin(key, destination)

        def later():
            waiting.set()
            assert gate.wait(60)
            rest()

        return later

    bank.store.begin = held
    return gate, waiting


def every_teacher(rank):
    """Weights and heads belong to the requested teacher, in any order, whatever the slots held before."""
    groups = _models.groups_for({})
    bank = bank_of(6, groups)
    expected = {source.name: weights(source, groups) for source in sources(6)}
    for name in ("t0", "t3", "t1", "t1", "t5", "t2", "t4", "t0", "t3", "t2"):
        chunk = bank.make_resident(name)
        bank.prefetch(bank.names[int(name[1]) - 1])
        parameters, head = expected[name]
        for key, parameter in chunk.named_parameters():
            if parameter.numel():  # a forward pass does not need the head
                assert torch.equal(parameter, parameters[key]), (name, key)
                assert not parameter.requires_grad
        assert not chunk.training
        assert torch.equal(bank.head(name), head)
    pair = bank.heads(["t1", "t4"])
    assert [torch.equal(a, expected[n][1]) for a, n in zip(pair, ("t1", "t4"))] == [True, True]
    return True


def test_every_teacher_has_its_own_weights(pool):
    assert pool.run(every_teacher) == [True]


def sizes(rank):
    groups = _models.groups_for({})
    largest = max(sum(p.numel() for p in weights(source, groups)[0].values()) * 4 for source in sources(4))
    banks = {count: bank_of(count, groups) for count in (1, 2, 4, 12)}
    modules = {count: len(bank._skeletons) for count, bank in banks.items()}
    return {n: (b.device_bytes(), b.host_bytes()) for n, b in banks.items()}, modules, largest


def test_device_bytes_do_not_grow_with_teachers_or_architectures(pool):
    ((by_count, modules, largest),) = pool.run(sizes)
    assert by_count[12][0] == by_count[4][0] <= 2 * largest + 20_000  # alignment of small tensors
    assert by_count[1][0] < by_count[2][0]
    assert by_count[12][1] == 3 * by_count[4][1]
    assert modules == {1: 1, 2: 2, 4: 4, 12: 4}


def arrivals(rank):
    """Traffic when the next teacher arrives during work, when it is waited for, and when it is resident."""
    bank = bank_of(4)
    gate, waiting = gated(bank)
    gate.set()
    bank.make_resident("t0")
    gate.clear()
    waiting.clear()
    bank.prefetch("t1")  # must not block, or the gate would never open
    bank.take_traffic()
    assert waiting.wait(60)
    time.sleep(0.5)  # the resident teacher works
    gate.set()
    bank._arrivals._worker.submit(lambda: None).result()  # t1 has landed
    bank.make_resident("t1")
    hidden = bank.take_traffic()["t1"]
    gate.clear()
    threading.Timer(0.5, gate.set).start()
    bank.make_resident("t2")
    waited = bank.take_traffic()["t2"]
    bank.make_resident("t1")
    return hidden, waited, bank.take_traffic()["t1"]


def test_an_arrival_is_hidden_when_work_goes_on_and_counted_when_not(pool):
    ((hidden, waited, again),) = pool.run(arrivals)
    assert hidden.loads == 1 and hidden.wait_seconds < 0.1 < 0.5 <= hidden.load_seconds
    assert waited.wait_seconds > 0.25 and waited.num_bytes > 0
    assert again.loads == 0 and again.wait_seconds < 0.1  # it was still resident


def heads_rule(rank):
    """Loads of heads for a plan or a mixture."""
    bank = bank_of(8, max_mixture=2)
    slots = len(bank._head_slots)
    first = bank.heads(["t0", "t1"])
    bank.prefetch_head("t2")
    kept = [head.clone() for head in first]
    bank._arrivals._worker.submit(lambda: None).result()  # the arrival of t2 has landed
    untouched = all(torch.equal(a, b) for a, b in zip(first, kept))
    bank.prefetch_head("t3")  # every slot is in use or prefetched: t3 replaces t2, not a head in use
    bank._arrivals._worker.submit(lambda: None).result()
    untouched &= all(torch.equal(a, b) for a, b in zip(first, kept))
    bank.heads(["t3"])
    bank.prefetch_head("t4", slot=2)
    bank.reserve_heads(5)
    return slots, untouched, len(bank._head_slots), torch.equal(bank.head("t0"), kept[0])


def test_heads_in_use_are_never_overwritten(pool):
    assert pool.run(heads_rule) == [(3, True, 5, True)]


def encoded_step(rank, dtype):
    learner = _models.make_learner(MOE, {}, params_dtype="float32", teacher_storage=dict(dtype=dtype))
    metrics = train_step(learner, [plan_step(learner, _models.batch(16, seed=1))])
    return metrics["loss"], learner.bank.host_bytes(), metrics["grad_norm"]


def test_eight_bits_cost_little_accuracy_and_save_most_bytes(pool):
    (loss, size, norm) = pool.run(encoded_step, None)[0]
    for dtype, error in (("int8", 0.01), ("fp8", 0.03)):
        (other, encoded, other_norm) = pool.run(encoded_step, dtype)[0]
        assert other == pytest.approx(loss, rel=error) and other_norm == pytest.approx(norm, rel=3 * error)
        assert other != loss
        assert encoded < 0.5 * size  # `size` is float32; rows of 32 need many scales


def vanishing(rank, directory):
    learner = _models.make_learner(
        DENSE,
        {},
        params_dtype="float32",
        teacher_storage=dict(mode="mmap"),
        teacher_directory=directory,
        schedule=dict(micro_batch_size=2),
    )
    train_step(learner, [plan_step(learner, _models.batch(8))])
    torch.distributed.barrier()
    if rank == 1:
        path = learner.bank.store._path_of(("b", "dense"))
        path.write_bytes(path.read_bytes()[:-1000])
    torch.distributed.barrier()
    messages = []
    try:
        train_step(learner, [plan_step(learner, _models.batch(8))])
    except TeacherFileError as error:
        messages.append(str(error))
    try:  # a file that changes after the check: the rank that reads it raises
        learner.bank.make_resident("c")
        learner.bank.prefetch("a")
        learner.bank.make_resident("b")
    except TeacherFileError as error:
        messages.append(str(error))
    torch.distributed.barrier()
    if rank == 0:
        path = learner.bank.store._path_of(("b", "dense"))
        path.unlink()
    torch.distributed.barrier()
    try:
        train_step(learner, [plan_step(learner, _models.batch(8))])
    except TeacherFileError as error:
        messages.append(str(error))
    return messages


def restart(rank, directory):
    try:
        bank_of(2, storage=dict(mode="mmap"), directory=directory)
    except ConfigError as error:
        return str(error)
    return "built"


def test_a_file_that_changes_or_vanishes_is_an_error_on_every_rank(two, tmp_path):
    for messages in two.run(vanishing, str(tmp_path)):
        changed, read, gone = messages
        assert "teacher 'b'" in changed and "has changed since the run began (2 of 2 ranks" in changed
        assert "last checkpoint is complete" in changed.replace("\n", " ")
        assert "has changed since the run began" in read
        assert "cannot be read: No such file" in gone


def test_files_of_an_earlier_start_are_checked(two, tmp_path):
    assert two.run(restart, str(tmp_path)) == ["built", "built"]
    assert two.run(restart, str(tmp_path)) == ["built", "built"]
    path = next(tmp_path.rglob("dense-*.weights"))
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    for message in two.run(restart, str(tmp_path)):
        assert str(path) in message and "was changed since it was written; delete it" in message
    path.unlink()
    assert two.run(restart, str(tmp_path)) == ["built", "built"]


def small_host(rank, mode):
    placement.available_host_bytes = lambda: 200_000
    try:
        bank_of(8, storage=dict(mode=mode), directory="unused")
    except ConfigError as error:
        return str(error)
    return "built"


def test_a_host_without_the_memory_is_refused_with_the_need_of_every_mode(two):
    messages = two.run(small_host, "host")
    assert messages[0] == messages[1]
    for part in ("mode: host needs", "of its 2 ranks", "GiB are free", "host_sharded", "mmap 0.00 GiB"):
        assert part in messages[0]
