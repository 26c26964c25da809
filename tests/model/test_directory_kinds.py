"""Paths that are not a readable model: the message names the kind and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_mopd.config import ConfigError
from megatron_mopd.model.checkpoint import find_checkpoint
from megatron_mopd.model.convert import open_checkpoint
from megatron_mopd.model.hugging_face import HuggingFaceCheckpoint
from tests.model import _families

ADAPTER = json.dumps({"base_model_name_or_path": "Qwen/Qwen3-8B", "peft_type": "LORA"})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "model"
    _families.make("llama", directory)
    return directory


def message(read, path, where) -> str:
    with pytest.raises(ConfigError) as error:
        read(path, where)
    said = str(error.value)
    assert said.startswith(f"{where}: ") and "\n" not in said and str(path) in said, said
    assert len(said) - len(str(path)) * said.count(str(path)) < 330, said
    return said


# Kind of directory -> (its files, parts of every message about it)
KINDS = {
    "empty": ({}, ["the directory is empty"]),
    "LoRA": (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": "", "README.md": ""},
        ["it is a LoRA adapter", "its base Qwen/Qwen3-8B", "merge_and_unload"],
    ),
    "LoRA without configuration": ({"adapter_model.bin": ""}, ["it is a LoRA adapter"]),
    "GGUF": ({"Qwen3-8B-Q4_K_M.gguf": "", "README.md": ""}, ["Qwen3-8B-Q4_K_M.gguf is a GGUF file"]),
    "old Megatron-LM": (
        {"latest_checkpointed_iteration.txt": "20", "iter_0000020/mp_rank_00/model_optim_rng.pt": ""},
        [
            "iter_0000020: it is a Megatron-LM checkpoint in the old format",
            "--ckpt-convert-format torch_dist",
        ],
    ),
    "tracker of nothing": (
        {"latest_checkpointed_iteration.txt": "20"},
        ["latest_checkpointed_iteration.txt names iter_0000020, which does not exist"],
    ),
    "tracker of noise": ({"latest_checkpointed_iteration.txt": "../x\x1b"}, ["names ../x", "does not exist"]),
    "unfinished": ({"__0_0.distcp": ""}, ["it is incomplete", ".metadata"]),
    "DeepSpeed": ({"latest": "global_step5", "global_step5/x": ""}, ["a DeepSpeed checkpoint"]),
    "NeMo": ({"qwen.nemo": ""}, ["a NeMo checkpoint (qwen.nemo)"]),
    "diffusers": ({"model_index.json": "{}"}, ["diffusers"]),
    "pickled": ({"consolidated.00.pth": ""}, ["holds pickled weights"]),
    "Flax": ({"flax_model.msgpack": ""}, ["flax_model.msgpack is not a PyTorch file"]),
    "shards without index": ({"model-00001-of-00002.safetensors": ""}, ["nor named by an index"]),
    "cache of the Hub": ({"snapshots/0a1b/config.json": "{}", "blobs/x": ""}, ["use snapshots/0a1b in it"]),
    "above a model": ({"checkpoint-500/config.json": "{}"}, ["did you mean", "checkpoint-500"]),
    "a run": ({"checkpoints/latest_checkpointed_iteration.txt": "1"}, ["did you mean", "checkpoints"]),
    "anything": ({"notes.txt": ""}, ["no config.json"]),
    "damaged": ({"config.json": "{", "model.safetensors": ""}, ["config.json is not readable"]),
    "no model_type": ({"config.json": "{}", "model.safetensors": ""}, ["has no model_type"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_directories_are_told_apart(tmp_path, kind):
    files, parts = KINDS[kind]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    readers = [find_checkpoint, open_checkpoint]
    if "config.json" not in files:
        readers.append(HuggingFaceCheckpoint.open)
    for read in readers:
        said = message(read, tmp_path, "student.load")
        for part in parts:
            assert part in said, said


@pytest.mark.parametrize(
    "files, part",
    [
        ({}, "but no weights"),
        ({"adapter_model.safetensors": ""}, "it is a LoRA adapter"),
        ({"Qwen3.gguf": ""}, "is a GGUF file"),
        ({"tf_model.h5": ""}, "tf_model.h5 is not a PyTorch file"),
        ({"pytorch_model.bin": ""}, "pytorch_model.bin holds pickled weights"),
        ({"model-00001-of-00002.safetensors": ""}, "nor named by an index"),
    ],
    ids=str,
)
def test_configurations_without_weights_are_told_apart(model, tmp_path, files, part):
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    said = message(HuggingFaceCheckpoint.open, tmp_path, "student.load")
    assert "no weights" in said and part in said


def test_an_adapter_beside_a_model(model, tmp_path):
    """transformers would load the base that the adapter names and ignore the model."""
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter_config.json").write_text(ADAPTER)
    assert "a LoRA adapter" in message(open_checkpoint, tmp_path, "teachers.math.load")


def test_files_and_names(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = message(find_checkpoint, Path("Qwen/Qwen3-8B"), "student.load")
    assert "hf download Qwen/Qwen3-8B --local-dir DIR" in said
    for path in ("gone", "/gone/model", "./Qwen/Qwen3/8B", "models/Qwen"):
        (tmp_path / "models").mkdir(exist_ok=True)
        assert message(find_checkpoint, Path(path), "x").endswith(f"not found: {Path(path)}")
    said = message(find_checkpoint, model / "model.safetensors", "student.load")
    assert "is a file" in said and said.endswith(f"together with its config.json: {model}")
    assert message(HuggingFaceCheckpoint.open, model / "model.safetensors", "--hf").endswith(str(model))
    for name, part in (
        ("x.gguf", "GGUF"),
        ("x.pt", "pickled"),
        ("x.nemo", "NeMo"),
        ("x.txt", "directory of"),
    ):
        (tmp_path / name).write_text("")
        assert part in message(find_checkpoint, tmp_path / name, "student.load")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert message(find_checkpoint, tmp_path / "x.safetensors", "x").endswith(f"config.json: {tmp_path}")


def test_a_megatron_checkpoint_for_a_hugging_face_model(tmp_path):
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "model.json").write_text("{}")
    assert "convert_megatron_to_hf.py" in message(HuggingFaceCheckpoint.open, tmp_path, "--hf")
