"""Model files from an untrusted source: malicious links, names, headers and JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from megatron_mopd.config import ConfigError
from megatron_mopd.data.tokenizer import HuggingFaceTokenizer
from megatron_mopd.model import companions, convert, hugging_face, weight_files
from megatron_mopd.model.checkpoint import (
    find_checkpoint,
    latest_iteration,
    read_architecture,
    read_model_config,
)
from megatron_mopd.model.checksums import verify_checksums
from megatron_mopd.model.companions import copy_companion_files, read_companions, take_over_companions
from megatron_mopd.model.hugging_face import HuggingFaceCheckpoint
from megatron_mopd.model.safetensors_files import TensorInfo, read_header
from megatron_mopd.model.weight_source import Companions
from megatron_mopd.teachers.fingerprint import checkpoint_fingerprints
from tests.model import _families

INDEX = "model.safetensors.index.json"
SECRET = "root:x:0:0\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original")
    _families.make("qwen3", directory, max_shard_size="60KB")
    words = {word: number for number, word in enumerate("<unk> </s> a b c 1 2 3 + = copy :".split())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(
        directory
    )
    (directory / "README.md").write_text("a model")
    return directory


@pytest.fixture
def model(original, tmp_path):
    """A copy to modify."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "outside" / "passwd.json"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


def refused(read, *parts):
    """Check that `read` raises a one-line `ConfigError` that contains all `parts`."""
    with pytest.raises(ConfigError) as error:
        read()
    message = str(error.value)
    assert "\n" not in message and len(message) < 700, message
    for part in parts:
        assert str(part) in message, message
    return message


def opened(path):
    return HuggingFaceCheckpoint.open(path, "student.load")


def everything(path) -> None:
    source = opened(path)
    for weight in source.weights:
        source.whole(weight)


def link(path: Path, target) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


# Links.


@pytest.mark.parametrize(
    "name", ["README.md", "generation_config.json", "tokenizer.model", "LICENSE", "sub/notes.TXT"]
)
@pytest.mark.parametrize("absolute", [True, False])
def test_companion_that_is_a_link_out_does_not_travel(model, secret, tmp_path, name, absolute):
    (model / name).parent.mkdir(exist_ok=True)
    link(model / name, secret if absolute else os.path.relpath(secret, (model / name).parent))
    target = tmp_path / "target"
    target.mkdir()
    refused(lambda: copy_companion_files(model, target), model / name, "leads out", "cp -rL")
    assert not any(SECRET in file.read_text(errors="replace") for file in target.rglob("*") if file.is_file())
    refused(lambda: opened(model), "student.load", model / name, "leads out")


def test_directories_behind_links_are_not_entered(model, secret, tmp_path):
    (model / "additional").symlink_to(secret.parent)
    copy_companion_files(model, tmp_path / "target")
    assert not (tmp_path / "target" / "additional").exists()
    HuggingFaceTokenizer(model).save(tmp_path / "tokenizer")
    (model / "additional").rename(model / "additional_chat_templates")
    with pytest.raises(ConfigError):  # either the directory or its templates are refused
        HuggingFaceTokenizer(model).save(tmp_path / "other")
    assert not list((tmp_path / "other").rglob("passwd*"))


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_description_that_is_a_link_out_is_not_read(model, tmp_path, name):
    shutil.move(model / name, tmp_path / name)
    link(model / name, tmp_path / name)
    refused(lambda: find_checkpoint(model, "student.load") and opened(model), model / name, "leads out")


def test_weights_that_are_a_link_out_are_not_read(model, tmp_path):
    shard = sorted(model.glob("*.safetensors"))[1]
    shutil.move(shard, tmp_path / shard.name)
    link(shard, tmp_path / shard.name)
    refused(lambda: opened(model), shard, "leads out")


def test_links_inside_the_model_are_followed(model, tmp_path):
    shard = sorted(model.glob("*.safetensors"))[1]
    (model / "files").mkdir()
    for path, absolute in ((shard, True), (model / "config.json", False)):
        moved = model / "files" / f"{path.name}.data"
        shutil.move(path, moved)
        link(path, moved if absolute else f"files/{moved.name}")
    (tmp_path / "alias").symlink_to(model)  # the directory itself may be a link
    for directory in (model, tmp_path / "alias"):
        everything(directory)
        copy_companion_files(directory, tmp_path / directory.name / "copy")
        assert json.loads((tmp_path / directory.name / "copy" / "config.json").read_text())


@pytest.fixture
def hub(original, tmp_path):
    """The model as `huggingface_hub` stores it."""
    repository = tmp_path / "hub" / "models--somebody--model"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    for file in original.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (snapshot / "extra").mkdir()
    (snapshot / "extra" / "NOTES.md").symlink_to(f"../../../blobs/{blob.name}")
    return snapshot


def test_snapshots_of_the_hub_are_read_and_travel(hub, original, tmp_path):
    everything(find_checkpoint(hub, "student.load"))
    copy_companion_files(hub, tmp_path / "copy")
    for name in ("config.json", "tokenizer.json", "README.md"):
        copied = tmp_path / "copy" / name
        assert copied.read_bytes() == (original / name).read_bytes() and not copied.is_symlink()
    assert (tmp_path / "copy" / "extra" / "NOTES.md").exists()
    tokenizer = HuggingFaceTokenizer(hub)
    tokenizer.save(tmp_path / "tokenizer")
    assert HuggingFaceTokenizer(tmp_path / "tokenizer").fingerprint() == tokenizer.fingerprint()


def test_snapshots_lead_to_files_of_their_own_repository_alone(hub, secret, tmp_path):
    repository, readme = hub.parents[1], hub / "README.md"
    other = tmp_path / "hub" / "models--other--model" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(secret, other / "blob")
    (repository / "blobs" / "loop").symlink_to(secret)
    (repository / "refs").mkdir()
    shutil.copy(secret, repository / "refs" / "main")
    for target in (
        "../../blobs/loop",
        "../../../models--other--model/blobs/blob",
        "../../blobs/../refs/main",
        secret,
    ):
        link(readme, target)
        refused(lambda: opened(hub), readme, "leads out")
    shutil.move(repository / "blobs", tmp_path / "blobs")
    (repository / "blobs").symlink_to(secret.parent)
    link(readme, f"../../blobs/{secret.name}")
    with pytest.raises(ConfigError, match="leads out"):
        copy_companion_files(hub, tmp_path / "copy")


@pytest.mark.parametrize("name", ["model-00009-of-00009.safetensors", "config.json"])
def test_pipes_are_not_waited_for(model, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["x"] = "model-00009-of-00009.safetensors"
    (model / INDEX).write_text(json.dumps(index))
    refused(lambda: opened(model), name, "not a regular file")
    if name != "config.json":
        refused(lambda: checkpoint_fingerprints(model), name)


# Which files are copied.

TRAVEL = (
    "config.json generation_config.json tokenizer.model Tokenizer.JSON chat_template.jinja vocab.txt "
    "qwen.tiktoken merges.txt README.md README LICENSE license.txt NOTICE USE_POLICY.md vocab.bpe"
).split()
STAY = """
    run.sh RUN.SH lib.so lib.SO.1 data.pkl data.PKL data.Pickle model.bin MODEL.BIN modeling_x.py X.PY x.pyc
    weights.safetensors W.SAFETENSORS x.pt x.Pth x.ckpt x.gguf x.h5 x.onnx x.exe x.dll x.dylib x.jar
    x.js x.ps1 x.npy x.npz x.zip x.tar.gz x.whl x.html
    x.ipynb x.desktop Makefile Dockerfile core x.json.sh x.service
    sitecustomize.PY x.pth .netrc .hidden/config.json pytorch_model.bin.index.json x.joblib x.dill x.yaml
""".split()


def test_configuration_tokenizer_and_texts_travel_and_nothing_else(tmp_path):
    for name in [*TRAVEL, *STAY]:
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text("{}")
        (tmp_path / "from" / name).chmod(0o755)
    copy_companion_files(tmp_path / "from", tmp_path / "to")
    assert sorted(file.name for file in (tmp_path / "to").rglob("*")) == sorted(TRAVEL)
    assert not any(os.access(file, os.X_OK) for file in (tmp_path / "to").iterdir()) or os.geteuid() == 0


def test_large_files_do_not_travel(model, tmp_path):
    with open(model / "data.txt", "wb") as stream:
        stream.truncate(10**9)
    refused(lambda: copy_companion_files(model, tmp_path / "to"), model / "data.txt", "has 1000000000 bytes")
    refused(lambda: opened(model), model / "data.txt")


@pytest.fixture
def record(original, tmp_path, monkeypatch):
    """The files of a Hugging Face model that a converted checkpoint keeps."""
    monkeypatch.setattr(companions.dist, "get_rank", lambda: 0)
    directory = tmp_path / "checkpoint" / "hugging_face"
    directory.mkdir(parents=True)
    copy_companion_files(original, directory)
    source = HuggingFaceCheckpoint.open(original, "--hf")
    layout = {"family": "qwen3", "files": source.companions.headers, "aliases": {}}
    (directory / "layout.json").write_text(json.dumps(layout))
    save_file({"model.layers.9.x": torch.zeros(2)}, directory / "untrained.safetensors")
    return directory


def test_record_is_taken_over_without_links_and_code(record, secret, tmp_path):
    take_over_companions([record], tmp_path / "first")
    assert {"layout.json", "untrained.safetensors", "config.json"} <= set(os.listdir(tmp_path / "first"))
    assert read_companions(tmp_path / "first", "--checkpoint")[1].model_type == "qwen3"
    (record / "run.sh").write_text("rm -r /")
    (record / "templates").symlink_to(secret.parent)
    take_over_companions([record], tmp_path / "second")
    assert sorted(os.listdir(tmp_path / "second")) == sorted(os.listdir(tmp_path / "first"))
    for name in ("notes.json", "layout.json", "untrained.safetensors"):
        shutil.copy(secret, tmp_path / "sound")
        if (record / name).exists():
            shutil.copy(record / name, tmp_path / "sound")
        link(record / name, secret)
        refused(lambda: take_over_companions([record], tmp_path / f"with {name}"), record / name, "leads out")  # noqa: B023
        link(record / name, "config.json")
        shutil.copy(tmp_path / "sound", tmp_path / "kept")
        (record / name).unlink()
        shutil.copy(tmp_path / "kept", record / name)


HEADER = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})


@pytest.mark.parametrize(
    "files",
    [
        {"../evil.safetensors": HEADER},
        {"/tmp/evil.safetensors": HEADER},
        {"a/b.safetensors": HEADER},
        {"a\\b.safetensors": HEADER},
        {".safetensors": HEADER},
        {"": HEADER},
        {"x\0.safetensors": HEADER},
        {"run.sh": HEADER},
        {"config.json": HEADER},
        {"a.safetensors": HEADER.replace("[2]", "[3]")},
        {"a.safetensors": HEADER.replace("[0, 8]", "[8, 16]")},
        {"a.safetensors": "[]"},
        {"a.safetensors": None},
        {"a.safetensors": {"w": 1}},
        [HEADER],
        "a.safetensors",
    ],
)
def test_record_s_file_names_are_checked_before_anything_is_written(record, files):
    layout = json.loads((record / "layout.json").read_text())
    (record / "layout.json").write_text(json.dumps(layout | {"files": files}))
    refused(lambda: read_companions(record, "--checkpoint"), "--checkpoint: ", "layout.json")


@pytest.mark.parametrize("aliases", [[], None, {"a": 1}, "x"])
def test_record_s_aliases_are_names(record, aliases):
    layout = json.loads((record / "layout.json").read_text())
    (record / "layout.json").write_text(json.dumps(layout | {"aliases": aliases}))
    refused(lambda: read_companions(record, "--checkpoint"), "--checkpoint: ", "layout.json", "aliases")


@pytest.mark.parametrize(
    "extra",
    [
        Companions(aliases={"copy": "nothing"}),
        Companions(aliases={"w": "w"}),
        Companions(untrained={"w": TensorInfo(torch.float32, (9,))}),
    ],
)
def test_record_s_tensors_are_not_the_model_s(extra):
    weight = SimpleNamespace(hugging_face=("w",), rule=SimpleNamespace(shapes=[(2,)]))
    source = SimpleNamespace(weights=[weight], companions=extra, dtype=lambda _: torch.float32)
    refused(lambda: convert._tensors_to_write(source, None), "tensor ")


# Headers and indices.


def write_safetensors(path: Path, header: str, data: bytes = b"\0" * 16) -> None:
    path.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + data)


def test_header_beyond_the_format_s_limit_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", 2 * 10**8))
        stream.truncate(3 * 10**8)  # sparse: 3 kB on disk
    refused(lambda: read_header(path, "student.load"), "student.load: ", path, "limit is 100000000")


def entry(**values):
    return {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | values}


def two(first, second, shape):
    made = {"dtype": "F32", "shape": [shape]}
    return {"a": made | {"data_offsets": first}, "b": made | {"data_offsets": second}}


HEADERS = {
    "negative shape": entry(shape=[-4]),
    "two negatives": entry(shape=[-2, -2]),
    "text in a shape": entry(shape=["4"]),
    "text for a shape": entry(shape="4"),
    "bool in a shape": entry(shape=[True, 4]),
    "fraction in a shape": entry(shape=[4.0]),
    "mapping for a shape": entry(shape={"0": 4}),
    "huge shape": entry(shape=[2**62, 2**62]),
    "zero times huge": entry(shape=[0, 2**60], data_offsets=[0, 0]),
    "shape of more bytes": entry(shape=[5]),
    "negative offset": entry(data_offsets=[-16, 0]),
    "reversed offsets": entry(data_offsets=[16, 0]),
    "three offsets": entry(data_offsets=[0, 16, 16]),
    "text offsets": entry(data_offsets=["0", "16"]),
    "offsets null": entry(data_offsets=None),
    "unknown dtype": entry(dtype="F4"),
    "dtype list": entry(dtype=["F32"]),
    "extra key": entry(extra=1),
    "missing key": {"w": {"dtype": "F32", "shape": [4]}},
    "entry is a list": {"w": ["F32", [4], [0, 16]]},
    "list": [entry()],
    "overlapping": two([0, 12], [4, 16], 3),
    "the same place": two([0, 16], [0, 16], 4),
    "hole": two([0, 4], [12, 16], 1),
    "metadata list": entry() | {"__metadata__": ["x"]},
    "metadata number": entry() | {"__metadata__": {"x": 1}},
    "unprintable name": {"w\x1b[2J": entry()["w"]},
}
TEXTS = {
    "not a number": '{"w": NaN}',
    "infinity": '{"w": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 16]}}',
    "twice": json.dumps(entry())[:-1] + "," + json.dumps(entry())[1:],
    "nested": '{"w":' + "[" * 100_000 + "]" * 100_000 + "}",
    "long number": '{"w": ' + "9" * 10_000 + "}",
}


@pytest.mark.parametrize("name", [*HEADERS, *TEXTS])
def test_header_is_refused(tmp_path, name):
    write_safetensors(tmp_path / "x.safetensors", TEXTS.get(name) or json.dumps(HEADERS[name]))
    refused(
        lambda: read_header(tmp_path / "x.safetensors", "student.load"), "student.load: ", "x.safetensors"
    )


def test_headers_of_the_format_are_read(tmp_path):
    tensors = {"a": torch.zeros(0, 3), "b": torch.zeros(()), "c": torch.zeros(2, 2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    _, infos = read_header(tmp_path / "x.safetensors", "student.load")
    assert {name: info.shape for name, info in infos.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/tmp/outside.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "x\0.safetensors",
        "x.bin",
        ".hidden.safetensors",
        1,
        None,
        ["model.safetensors"],
        {"x": 1},
    ],
)
def test_index_names_files_beside_it(model, tmp_path, monkeypatch, file):
    save_file({"x": torch.zeros(2)}, tmp_path / "outside.safetensors")
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (model / INDEX).write_text(json.dumps(index))

    def never(*args):
        raise AssertionError("opened")

    monkeypatch.setattr(weight_files, "read_header", never)
    refused(lambda: opened(model), "student.load: ", INDEX)


def test_tensor_in_two_files_is_refused(model):
    index = json.loads((model / INDEX).read_text())["weight_map"]
    name, file = next(iter(index.items()))
    extra = model / "model-99999.safetensors"
    save_file({name: torch.zeros(2)}, extra)
    weight_map = index | {"another": extra.name}
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(lambda: opened(model), name, extra.name, file)


# JSON.

JSON = {
    "list": b"[]",
    "text": b'"x"',
    "null": b"null",
    "number": b"1",
    "nested": b'{"model_type": ' + b"[" * 100_000,
    "twice": b'{"model_type": "qwen3", "model_type": "qwen3"}',
    "not a number": b'{"model_type": "qwen3", "model": {}, "x": NaN}',
    "not UTF-8": b'{"x": "\xff"}',
    "UTF-16": '{"model_type": "qwen3"}'.encode("utf-16"),
    "empty": b"",
    "NUL": b"\0" * 100,
}


def large(path: Path) -> None:
    with open(path, "wb") as stream:
        stream.truncate(3 * 10**8)


@pytest.mark.parametrize("content", [*JSON, "large"])
@pytest.mark.parametrize("name", ["config.json", INDEX, "model.json", "checksums.json", "layout.json"])
def test_json_that_is_no_mapping(model, name, content):
    path = model / name
    path.write_bytes(JSON.get(content, b""))
    if content == "large":
        large(path)
    readers = {
        "config.json": lambda: hugging_face.read_config(model, "student.load"),
        INDEX: lambda: opened(model),
        "model.json": lambda: read_architecture(model, "student.load"),
        "checksums.json": lambda: verify_checksums(model, "student.load"),
        "layout.json": lambda: read_companions(model, "student.load"),
    }
    reasons = {"large": "limit", "nested": "nested", "twice": "given twice", "not a number": "NaN"}
    refused(readers[name], "student.load: ", path, reasons.get(content, ""))
    if name == "config.json":
        assert hugging_face.is_hugging_face(model) is False


@pytest.mark.parametrize("model_type", [["qwen3"], {"a": 1}, 1, True, None, "x" * 10**5])
def test_model_type_is_a_name(model, model_type):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(ConfigError, match="is not supported"):
        opened(model)


def test_other_configuration_that_is_named_is_not_read(model):
    """`transformers` reads the file that `configuration_files` names instead of `config.json`."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.4.0.0.json").write_text(json.dumps(config | {"vocab_size": 7}))
    (model / "config.json").write_text(json.dumps(config | {"configuration_files": ["config.4.0.0.json"]}))
    assert opened(model).model.vocab_size == config["vocab_size"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (
            "../outside/passwd.json",
            {"bytes": len(SECRET), "sha256": hashlib.sha256(SECRET.encode()).hexdigest()},
        ),
        ("/etc/hostname", {"bytes": 1, "sha256": ""}),
        ("a//b", {"bytes": 1, "sha256": ""}),
        ("", {"bytes": 1, "sha256": ""}),
        ("a\0b", {"bytes": 1, "sha256": ""}),
        ("config.json", {"bytes": True, "sha256": ""}),
        ("config.json", {"bytes": "1", "sha256": ""}),
        ("config.json", {"bytes": 1.0, "sha256": ""}),
        ("config.json", {"bytes": 1}),
        ("config.json", [1, "x"]),
    ],
)
def test_checksums_are_of_files_of_the_checkpoint(model, secret, name, value):
    (model / "checksums.json").write_text(json.dumps({name: value}))
    refused(lambda: verify_checksums(model, "student.load"), "student.load: ", "damaged")


def test_checksum_of_a_device_is_not_taken(model):
    link(model / "zero", "/dev/zero")
    (model / "checksums.json").write_text(json.dumps({"zero": {"bytes": 0, "sha256": ""}}))
    refused(lambda: verify_checksums(model, "student.load"), "leads out")


@pytest.mark.parametrize(
    "content", [{"model": [["a", 1]], "tokenizer": "x"}, {"model": {}, "tokenizer": 1}, {}]
)
def test_description_has_a_mapping_and_a_text(tmp_path, content):
    (tmp_path / "model.json").write_text(json.dumps(content))
    refused(
        lambda: read_architecture(tmp_path, "student.load"), "student.load: ", "model.json is not readable"
    )


def test_tracker_is_a_short_file_of_the_directory(tmp_path, secret):
    (tmp_path / "iter_0000003").mkdir()
    (tmp_path / "iter_0000003" / "model.json").write_text("{}")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for content in ("9" * 5000, "x", "-3", "\u0663\u0663"):
        tracker.write_text(content)
        assert latest_iteration(tmp_path) == 3
    large(tracker)
    assert latest_iteration(tmp_path) == 3
    tracker.unlink()
    os.mkfifo(tracker)
    assert latest_iteration(tmp_path) == 3


@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/environ"])
def test_tokenizer_of_a_model_is_not_read_through_a_link_out(model, target):
    link(model / "tokenizer.json", target)
    refused(
        lambda: read_model_config(model, "student.load"),
        "student.load: ",
        model / "tokenizer.json",
        "leads out",
    )
