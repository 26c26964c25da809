"""A checkpoint's pickles: torch uses exactly what the check saw, and neither calls what the file names."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import os
import pickle
import random
import resource
import shutil
from collections import OrderedDict
from pathlib import Path, PosixPath
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_mopd.config import ConfigError
from megatron_mopd.model import checkpoint as checkpoints
from megatron_mopd.model.pickled_files import refuse_code
from megatron_mopd.model.streamed_checkpoint import ChunkReader
from tests._distributed import run_ranks
from tests._runs import MODEL

FILE = "__0_0.distcp"
OBJECT = "layer.memory/shard_0_1"
WEIGHT = torch.arange(16.0).reshape(4, 4)
BIAS = torch.arange(6.0).to(torch.bfloat16)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.makedirs, (str(self.path), 0o777, True)


class Reduced:
    """Pickled as a call of `function` with `arguments`, followed by a state and items."""

    def __init__(self, function, arguments, *more):
        self.made = (function, arguments, *more)

    def __reduce__(self):
        return self.made


def blind(real: dict) -> Reduced:
    """An `OrderedDict` with the entries of `real` whose `items()` returns an empty `torch.Size`."""
    return Reduced(OrderedDict, (), {"items": torch.Size}, None, iter(real.items()))


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def make(directory: Path, objects=(None,)) -> Metadata:
    """Write a checkpoint of two tensors, one of them in two parts, and an object; returns its metadata."""
    directory.mkdir(parents=True, exist_ok=True)
    listed, places, data = {}, {}, b""
    for name, tensor, parts in (("layer.weight", WEIGHT, 1), ("layer.bias", BIAS, 2)):
        chunks, rows = [], len(tensor) // parts
        for start in range(0, len(tensor), rows):
            offset = torch.Size([start, *[0] * (tensor.dim() - 1)])
            chunks.append(ChunkStorageMetadata(offset, torch.Size([rows, *tensor.shape[1:]])))
            part = saved(tensor[start : start + rows].clone())
            places[MetadataIndex(name, offset)] = _StorageInfo(FILE, len(data), len(part))
            data += part
        listed[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
    part = saved(list(objects))
    listed[OBJECT] = BytesStorageMetadata()
    places[MetadataIndex(OBJECT)] = _StorageInfo(FILE, len(data), len(part))
    (directory / FILE).write_bytes(data + part)
    (directory / "common.pt").write_bytes(
        saved({"iteration": 3, "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]})
    )
    (directory / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    (directory / "model.json").write_text(
        json.dumps({"model": MODEL | {"vocab_size": 8}, "tokenizer": "none"})
    )
    metadata = Metadata(listed, None, places, StorageMeta(), "1.0.0")
    describe(directory, metadata)
    return metadata


def describe(directory: Path, metadata) -> None:
    (directory / ".metadata").write_bytes(metadata if isinstance(metadata, bytes) else pickle.dumps(metadata))


class Chunk(torch.nn.Module):
    """A model chunk that loads what `make` writes."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.layer.bias = torch.nn.Parameter(torch.zeros(6, dtype=torch.bfloat16))
        self.memory = "untouched"

    def sharded_state_dict(self, metadata=None):
        rank = dist.get_rank()
        state = {
            f"layer.{name}": ShardedTensor.from_rank_offsets(f"layer.{name}", parameter.data, replica_id=rank)
            for name, parameter in self.layer.named_parameters()
        }
        state["layer.memory"] = ShardedObject("layer.memory", None, (1,), (0,), replica_id=rank)
        return state

    def load_state_dict(self, state, strict=True):
        self.memory = state.pop("layer.memory")
        return super().load_state_dict(state, strict=strict)


def load(rank, directories, tamper=None):
    """Load as a run does; returns the values, or the error message."""
    chunk, directory = Chunk(), Path(directories[rank])
    if tamper is not None:
        original = checkpoints.refuse_code

        def refuse_then_tamper(*args):
            found = original(*args)
            tamper(directory)
            return found

        checkpoints.refuse_code = refuse_then_tamper
    groups = SimpleNamespace(collection=SimpleNamespace(dp_cp=None))
    try:
        checkpoints.load_weights([chunk], directory, groups, "student.load")
    except ConfigError as error:
        return str(error)
    return chunk.layer.weight.detach(), chunk.layer.bias.detach(), chunk.memory


def is_loaded(result) -> bool:
    return not isinstance(result, str) and torch.equal(result[0], WEIGHT) and torch.equal(result[1], BIAS)


def refused(directory, match=""):
    with pytest.raises(ConfigError, match=match) as error:
        refuse_code(directory, "student.load")
    message = str(error.value)
    assert message.startswith("student.load: ") and "\n" not in message and len(message) < 700
    with pytest.raises(ConfigError):
        ChunkReader(directory, "--checkpoint")


def test_what_a_run_writes_is_loaded(tmp_path):
    make(tmp_path, objects=({"kept": 1},))
    (result,) = run_ranks(1, load, [tmp_path])
    assert is_loaded(result) and result[2] == {"kept": 1}
    reader = ChunkReader(tmp_path, "--checkpoint")
    assert torch.equal(reader.read("layer.bias", (2,), (3,)), BIAS[2:5])


# name -> (how the metadata is changed, what the message says)
def _places(change):
    def apply(metadata):
        places = dict(metadata.storage_data)
        key = next(iter(places))
        return dataclasses.replace(metadata, storage_data=change(places, key))

    return apply


def _place(**values):
    return _places(
        lambda places, key: places | {key: dataclasses.replace(places[key], **values)},
    )


def _listed(key, value):
    return lambda m: dataclasses.replace(m, state_dict_metadata=m.state_dict_metadata | {key: value})


def _tensor(**values):
    def apply(metadata):
        entry = dataclasses.replace(metadata.state_dict_metadata["layer.weight"], **values)
        return _listed("layer.weight", entry)(metadata)

    return apply


def _with(target, **attributes):
    for name, value in attributes.items():
        object.__setattr__(target, name, value)
    return target


class _Text(str):
    pass


class _Number(int):
    pass


class _Dictionary(dict):
    pass


class _List(list):
    pass


def _size(*numbers):
    return Reduced(torch.Size, (numbers,))


ATTACKS = {
    "blind places": (lambda m: dataclasses.replace(m, storage_data=blind(m.storage_data)), "plain dict"),
    "blind list": (
        lambda m: dataclasses.replace(m, state_dict_metadata=blind(m.state_dict_metadata)),
        "plain dict",
    ),
    "dict subclass": (lambda m: dataclasses.replace(m, storage_data=_Dictionary(m.storage_data)), "asks for"),
    "list subclass": (_tensor(chunks=_List()), "asks for"),
    "str subclass": (_place(relative_path=_Text(FILE)), "asks for"),
    "int subclass": (_place(offset=_Number(0)), "asks for"),
    "enum for a number": (_place(offset=WriteItemType.TENSOR), "without a place"),
    "bool for a number": (_place(offset=False), "without a place"),
    "path for a name": (_place(relative_path=PosixPath(FILE)), "not the name of a file"),
    "layout for a list": (lambda m: dataclasses.replace(m, storage_data=torch.strided), "_get_layout"),
    "no list at all": (lambda m: dataclasses.replace(m, storage_data=None), "plain dict"),
    "a plan for a description": (lambda m: StorageMeta(), "not a list of tensors"),
    "tensor listed as bytes": (_listed("layer.weight", BytesStorageMetadata()), "layer.weight is listed as"),
    "bytes at a tensor's place": (
        lambda m: dataclasses.replace(
            _listed("layer.bias", BytesStorageMetadata())(m),
            storage_data=m.storage_data | {MetadataIndex("layer.bias"): _StorageInfo(FILE, 0, 10)},
        ),
        "layer.bias is listed as bytes",
    ),
    "another class's fields": (_listed("layer.weight", StorageMeta()), "StorageMeta instead"),
    "attribute on the description": (lambda m: _with(m, items=torch.Size), "attribute 'items'"),
    "attribute on a place": (
        _places(lambda p, k: p | {k: _with(copy.copy(p[k]), seek=torch.Size)}),
        "attribute 'seek'",
    ),
    "attribute on bytes": (_listed(OBJECT, _with(BytesStorageMetadata(), size=torch.Size([]))), "'size'"),
    "attribute on a part": (
        _tensor(chunks=[_with(ChunkStorageMetadata(torch.Size([0, 0]), WEIGHT.shape), x=1)]),
        "attribute 'x'",
    ),
    "arguments to a class": (_listed(OBJECT, Reduced(BytesStorageMetadata, ("x",))), "Bytes"),
    "state in slots": (
        lambda m: Reduced(Metadata, (), (vars(m), {"all_local_plans": 1})),
        "without fields",
    ),
    "state on a shape": (_tensor(size=Reduced(torch.Size, ((4, 4),), {"numel": torch.Size})), "layer.weight"),
    "state on a list of properties": (
        _tensor(properties=Reduced(TensorProperties, (), (torch.float32, 1, 2, 3, 4, 5))),
        "no dtype",
    ),
    "class for an object": (_tensor(properties=TensorProperties), "no dtype"),
    "parent directory": (_place(relative_path=f"../{FILE}"), "outside the checkpoint"),
    "absolute path": (_place(relative_path="/etc/hostname"), "outside the checkpoint"),
    "the directory itself": (_place(relative_path="."), "not the name"),
    "empty name": (_place(relative_path=""), "not the name"),
    "NUL in a name": (_place(relative_path="a\0b"), "not a file name"),
    "the description as data": (_place(relative_path=".metadata"), "not the name"),
    "another part's data": (_place(offset=20), "overlaps"),
    "negative offset": (_place(offset=-8), "without a place"),
    "beyond the end": (_place(offset=10**6), "ends at byte"),
    "longer than the file": (_place(length=2**40), "ends at byte|overlaps"),
    "compressed": (_place(transform_descriptors=["zstd"]), "not supported"),
    "huge shape": (
        _tensor(size=_size(2**40, 2**40), chunks=[ChunkStorageMetadata(_size(0, 0), _size(2**40, 2**40))]),
        "bytes by its shape",
    ),
    "huge dimension": (_tensor(size=_size(2**63, 4)), "not a list of sizes"),
    "many dimensions": (_tensor(size=_size(*[1] * 65)), "too many dimensions"),
    "negative shape": (_tensor(size=_size(-4, -4)), "not a list of sizes"),
    "text in a shape": (_tensor(size=_size("4", 4)), "not a list of sizes"),
    "negative part": (
        _tensor(chunks=[ChunkStorageMetadata(_size(-1, 0), torch.Size([4, 4]))]),
        "not a list of sizes",
    ),
    "part outside": (
        _tensor(chunks=[ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([4, 4]))]),
        "is not inside",
    ),
    "part missing": (_tensor(chunks=[]), "do not make up"),
    "part twice": (
        _tensor(chunks=[ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 4]))] * 2),
        "overlap",
    ),
    "no place": (_places(lambda p, k: {key: v for key, v in p.items() if key != k}), "without a place"),
    "place without a tensor": (
        _places(lambda p, k: p | {MetadataIndex("other"): _StorageInfo(FILE, 0, 0)}),
        "not listed",
    ),
    "sparse": (
        _tensor(properties=TensorProperties(torch.float32, layout=torch.sparse_coo)),
        "not a dense tensor",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(tmp_path, name):
    """Every manipulation of the metadata is rejected with its message."""
    change, message = ATTACKS[name]
    metadata = make(tmp_path / "checkpoint")
    describe(tmp_path / "checkpoint", change(metadata))
    refused(tmp_path / "checkpoint", message)


def test_blinded_check_does_not_run_code(tmp_path):
    trace = tmp_path / "was here"
    metadata = make(tmp_path / "checkpoint", objects=(Hostile(trace),))
    refused(tmp_path / "checkpoint", "cannot be read as tensors and plain values")
    describe(
        tmp_path / "checkpoint", dataclasses.replace(metadata, storage_data=blind(metadata.storage_data))
    )
    (result,) = run_ranks(1, load, [tmp_path / "checkpoint"])
    assert not trace.exists() and "is refused" in result


@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_tensors_are_in_regular_files_of_the_directory(tmp_path, kind):
    make(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / FILE
    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    refused(tmp_path / "checkpoint", {"link": "leads out of"}.get(kind, "not a regular file"))


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_descriptions_are_not_links_out(tmp_path, name):
    make(tmp_path / "checkpoint")
    shutil.move(tmp_path / "checkpoint" / name, tmp_path / "elsewhere")
    (tmp_path / "checkpoint" / name).symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "checkpoint", "leads out of")


def test_number_of_a_memo_costs_no_memory(tmp_path):
    make(tmp_path)
    # The C unpickler would allocate 2 ** 27 slots of 8 bytes for this file of 9 bytes.
    describe(tmp_path, b"\x80\x02Nr\x00\x00\x00\x04.")

    def peak(rank):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ConfigError):
            refuse_code(tmp_path, "student.load")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    assert run_ranks(1, peak)[0] < 100 * 1024  # KiB


COMMON = {
    "not a mapping": [1],
    "blind": {"x": Reduced(OrderedDict, (), {"items": torch.Size}, None, iter([("a", 1)]))},
    "tensor with attributes": {"x": _with(torch.zeros(2), narrow=torch.Size)},
    "parameter": {"x": torch.nn.Parameter(torch.zeros(2))},
    "sparse tensor": {"x": torch.eye(2).to_sparse()},
    "megatron-core's own classes": {"x": SimpleNamespace(items=1)},
    "itself": (lambda value: value.append(value) or {"x": value})([]),
}


@pytest.mark.parametrize("name", COMMON)
def test_common_state_holds_plain_values(tmp_path, name):
    make(tmp_path)
    (tmp_path / "common.pt").write_bytes(saved(COMMON[name]))
    refused(tmp_path, "common.pt cannot be read")


@pytest.mark.parametrize("text", ["[]", '{"sharded_backend": "zarr"}', '{"a": 1, "a": 2}', "[" * 10**5])
def test_format_is_torch_dist(tmp_path, text):
    make(tmp_path)
    (tmp_path / "metadata.json").write_text(text)
    refused(tmp_path, "metadata.json")


def test_files_that_change_after_the_check_are_not_read(tmp_path):
    trace = tmp_path / "was here"

    def tamper(directory):
        for name in (".metadata", "common.pt"):
            (directory / name).write_bytes(pickle.dumps(Hostile(trace)))

    make(tmp_path / "checkpoint")
    (result,) = run_ranks(1, load, [tmp_path / "checkpoint"], tamper)
    assert not trace.exists() and is_loaded(result)


def test_objects_that_change_after_the_check_run_no_code(tmp_path):
    trace = tmp_path / "was here"

    def tamper(directory):
        place = directory / FILE
        metadata = pickle.loads((directory / ".metadata").read_bytes())
        data = place.read_bytes()[: metadata.storage_data[MetadataIndex(OBJECT)].offset]
        place.write_bytes(data + saved([Hostile(trace)]))

    make(tmp_path / "checkpoint", objects=("x" * 1000,))
    (result,) = run_ranks(1, load, [tmp_path / "checkpoint"], tamper)
    assert not trace.exists() and "cannot load" in result


def test_every_rank_uses_what_rank_0_checked(tmp_path):
    """Each rank has its own copy, as on node-local disks; rank 1's was written by an attacker."""
    trace = tmp_path / "was here"
    for rank in range(2):
        make(tmp_path / str(rank))
    for name in (".metadata", "common.pt"):
        (tmp_path / "1" / name).write_bytes(pickle.dumps(Hostile(trace)))
    results = run_ranks(2, load, [tmp_path / "0", tmp_path / "1"])
    assert not trace.exists() and all(map(is_loaded, results))


@pytest.mark.parametrize(
    "value",
    [
        WEIGHT.T.to_sparse(),
        _with(WEIGHT.clone(), narrow=torch.Size),
        WEIGHT.double()[:2],
        WEIGHT[:2].clone(),
        OrderedDict(a=1),
    ],
)
def test_tensor_is_the_one_that_is_listed(tmp_path, value):
    metadata = make(tmp_path)
    place = metadata.storage_data[MetadataIndex("layer.weight", (0, 0))]
    data, part = (tmp_path / FILE).read_bytes(), saved(value)
    (tmp_path / FILE).write_bytes(data + part)
    place.offset, place.length = len(data), len(part)
    describe(tmp_path, metadata)
    with pytest.raises(ConfigError, match="layer.weight"):
        ChunkReader(tmp_path, "--checkpoint").read("layer.weight", (0, 0), (4, 4))


def test_pickles_of_transformer_engine_are_not_asked_for():
    """Transformer Engine unpickles them on load, whatever they contain."""
    names = ["w", "a._extra_state", "b._extra_state3", "_extra_state_of_mine.w"]
    state = checkpoints.without_extra_state({"model0": dict.fromkeys(names, 1)})
    assert list(state["model0"]) == ["w", "_extra_state_of_mine.w"]


class Independent(pickle.Unpickler):
    """Unpickles into the real classes, for metadata that passed the check."""

    def find_class(self, module, name):
        assert module.split(".")[0] in ("torch", "collections", "pathlib"), (module, name)
        return super().find_class(module, name)


def same(a, b) -> bool:
    """Whether two values are equal, with identical types throughout."""
    if type(a) is not type(b):
        return False
    if type(a) is TensorProperties:
        return a.dtype is b.dtype  # the other attributes are deprecated and not passed on
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return len(a) == len(b) and all(k in b and same(v, b[k]) for k, v in dict.items(a))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a


def mutated(metadata: Metadata, rng: random.Random):
    """The metadata with one value anywhere in it replaced, or its pickle with bytes changed."""
    if rng.random() < 0.5:
        data = bytearray(pickle.dumps(metadata, protocol=rng.choice([2, 4, 5])))
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(data))
            action = rng.randrange(4)
            if action == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif action == 1:
                data[place : place + rng.randint(1, 9)] = b""
            elif action == 2:
                data[place:place] = rng.choice([b"N", b"K\x01", b"}", b"]", b"\x86", b"R", b"b", b"(", b"0"])
            else:
                other = rng.randrange(len(data))
                data[place : place + 12] = data[other : other + 12]
        return bytes(data)
    metadata = copy.deepcopy(metadata)
    key = rng.choice(list(metadata.state_dict_metadata))
    index = rng.choice(list(metadata.storage_data))
    entry, place = metadata.state_dict_metadata[key], metadata.storage_data[index]
    targets = [metadata, entry, place, *getattr(entry, "chunks", [])]
    target = rng.choice(targets)
    names = [f.name for f in dataclasses.fields(target)] or ["size"]
    value = rng.choice(
        [
            None,
            True,
            0,
            1,
            -1,
            2**70,
            0.5,
            "",
            FILE,
            "../x",
            [],
            (),
            {},
            b"x",
            torch.Size([2]),
            torch.Size([4, 4]),
        ]
        + [PosixPath("x"), torch.float32, blind(metadata.storage_data), _size(-1), BytesStorageMetadata()]
        + [entry, place, index, list(metadata.storage_data), rng.randrange(4000)]
    )
    object.__setattr__(target, rng.choice([*names, *names, "items", "get"]), value)
    return pickle.dumps(metadata)


def test_what_the_check_saw_is_what_torch_uses(tmp_path, monkeypatch):
    """Damaged metadata: whatever passes equals what the real classes read from the same file, and is read
    only with torch's restricted unpickler."""
    metadata, rng = make(tmp_path), random.Random(5)
    sound = (tmp_path / "common.pt").read_bytes()
    restricted, passed = torch.load, 0

    def only_weights(*args, **kwargs):
        assert kwargs.get("weights_only") is True
        return restricted(*args, **kwargs)

    def never(*args, **kwargs):
        raise AssertionError("unpickled without a restriction")

    for number in range(800):
        with contextlib.suppress(pickle.PicklingError, TypeError):
            describe(tmp_path, mutated(metadata, rng))
        data = bytearray(sound)
        if number % 4 == 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "common.pt").write_bytes(bytes(data))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", only_weights)
            for name in ("load", "loads", "Unpickler"):
                patch.setattr(pickle, name, never)
            try:
                checked = refuse_code(tmp_path, "student.load")
                reader = ChunkReader(tmp_path, "--checkpoint")
                for key in ("layer.weight", "layer.bias"):
                    if shape := reader.shape(key):
                        reader.read(key, (0,) * len(shape), shape)
            except ConfigError:
                continue
        try:
            seen = Independent(io.BytesIO((tmp_path / ".metadata").read_bytes())).load()
        except (pickle.UnpicklingError, EOFError):  # C and Python disagree on a damaged frame's length
            continue
        used = reader._reader.read_metadata()
        for found in (checked.metadata, used):
            assert same(found.state_dict_metadata, seen.state_dict_metadata)
            assert same(found.storage_data, seen.storage_data)
        assert same(checked.common, torch.load(tmp_path / "common.pt", weights_only=True))
        passed += 1
    assert 30 < passed < 600
