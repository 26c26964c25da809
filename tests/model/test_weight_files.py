"""Directories that hold weights twice or contradict their configuration: no weight is dropped silently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_mopd.config import ConfigError
from megatron_mopd.model.build import build_model
from megatron_mopd.model.checkpoint import find_checkpoint, load_weights, read_architecture
from megatron_mopd.model.hugging_face import HuggingFaceCheckpoint
from tests import _models
from tests.model import _families, _running
from tests.model.test_conversion import same_files, to_hugging_face, to_megatron

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
ROWS = [[1, 5, 80, 3, 9], [7, 7, 2]]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The same Qwen3 in shards and as one file, and a tied Llama."""
    directory = tmp_path_factory.mktemp("originals")
    _families.make("qwen3", directory / "shards", max_shard_size="60KB")
    _families.make("qwen3", directory / "single")
    _families.make("llama", directory / "tied")
    return directory


@pytest.fixture
def copy(originals, tmp_path):
    return lambda name: Path(shutil.copytree(originals / name, tmp_path / name))


def change(file: Path, edit) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def weight_map(model: Path) -> dict[str, str]:
    return json.loads((model / INDEX).read_text())["weight_map"]


def put_twice(model: Path, edit=lambda tensor: None) -> tuple[str, str]:
    """Put a copy of the final norm, edited, into another shard; returns the files (indexed, other)."""
    files = weight_map(model)
    indexed = files[NORM]
    other = next(file for file in sorted(set(files.values())) if file != indexed)
    tensor = load_file(model / indexed)[NORM]
    edit(tensor)
    change(model / other, lambda tensors: tensors.update({NORM: tensor}))
    return indexed, other


def configure(model: Path, **values) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def refused(model: Path, *parts) -> None:
    with pytest.raises(ConfigError) as error:
        HuggingFaceCheckpoint.open(model, "student.load")
    message = str(error.value)
    assert message.startswith("student.load: ") and "\n" not in message
    for part in parts:
        assert str(part) in message, message


def same_as_transformers(pools, model: Path) -> None:
    expected = _families.reference_logits(model, ROWS, torch.float32)
    ((padded, _),) = pools(1).run(_running.logits, model, {}, "float32", ROWS)
    for row, (positions, values) in padded.items():
        assert (values - expected[row][positions]).abs().max() < 1e-4


# A separate LM head in a model with tied embeddings.


def test_a_tied_model_s_own_head_is_kept(copy, tmp_path, pools):
    """As in transformers: in logits and through conversion, and the exported configuration is untied."""
    model, megatron, back = copy("tied"), tmp_path / "megatron", tmp_path / "back"
    head = torch.randn(load_file(model / SINGLE)[EMBEDDING].shape)
    change(model / SINGLE, lambda tensors: tensors.update({HEAD: head}))
    assert not read_architecture(model, "test").share_embeddings_and_output_weights
    same_as_transformers(pools, model)
    pools(1).run(to_megatron, model, megatron)
    pools(1).run(to_hugging_face, megatron, back)
    assert torch.equal(load_file(back / SINGLE)[HEAD], head)
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(*(AutoModelForCausalLM.from_pretrained(path).lm_head.weight for path in (model, back)))


def test_a_tied_model_whose_file_repeats_the_embedding_stays_tied(copy, tmp_path, pools):
    model, megatron, back = copy("tied"), tmp_path / "megatron", tmp_path / "back"
    change(model / SINGLE, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert read_architecture(model, "test").share_embeddings_and_output_weights
    pools(1).run(to_megatron, model, megatron)
    pools(1).run(to_hugging_face, megatron, back)
    same_files(model, back)


def test_a_tied_model_whose_file_has_the_head_alone(copy, pools):
    model = copy("tied")
    change(model / SINGLE, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    same_as_transformers(pools, model)


def test_an_untied_model_without_a_head(copy):
    """transformers would initialize one at random."""
    model = copy("tied")
    configure(model, tie_word_embeddings=False)
    refused(model, f"tensor {HEAD} is missing", "tie_word_embeddings to true")


# Two sets of weights.


def put_single_file(model: Path, originals: Path) -> Path:
    return Path(shutil.copy(originals / "single" / SINGLE, model / SINGLE))


def test_a_single_file_that_equals_the_shards_beside_it(copy, originals, tmp_path, pools):
    model, megatron, back = copy("shards"), tmp_path / "megatron", tmp_path / "back"
    put_single_file(model, originals)
    pools(1).run(to_megatron, model, megatron)
    pools(1).run(to_hugging_face, megatron, back)
    same_files(originals / "shards", back)


@pytest.mark.parametrize(
    "edit, problem",
    [
        (lambda t: t[NORM][-1].add_(1e-6), f"{NORM} has different values"),
        (lambda t: t.update({NORM: t[NORM].double()}), f"{NORM} has a different shape or dtype"),
        (lambda t: t.pop(NORM), f"only the shards have {NORM}"),
        (lambda t: t.update(more=torch.ones(1)), "only the single file has more"),
    ],
    ids=["value", "dtype", "less", "more"],
)
def test_a_single_file_that_differs_from_the_shards_beside_it(copy, originals, edit, problem):
    model = copy("shards")
    change(put_single_file(model, originals), edit)
    refused(model, "two sets of weights", SINGLE, INDEX, problem, "remove one")


def test_a_single_file_beside_an_index_without_its_shards(copy, originals):
    model = copy("shards")
    shards = sorted(model.glob("model-*.safetensors"))
    put_single_file(model, originals)
    shards[0].unlink()
    refused(model, f"{shards[0]} is missing", f"{SINGLE} exists too", f"remove {INDEX}")
    (model / SINGLE).unlink()
    refused(model, f"{shards[0]} is missing", f"{INDEX} names it")


def test_an_index_of_the_single_file_is_one_set_of_weights(copy, originals):
    model = copy("single")
    index = dict.fromkeys(load_file(model / SINGLE), SINGLE)
    (model / INDEX).write_text(json.dumps({"weight_map": index}))
    HuggingFaceCheckpoint.open(model, "student.load")


# A tensor in two shards.


def test_a_tensor_that_is_equal_in_two_shards(copy, tmp_path, pools):
    """It is read, converted, and written to both shards again."""
    model, megatron, back = copy("shards"), tmp_path / "megatron", tmp_path / "back"
    put_twice(model)
    same_as_transformers(pools, model)
    pools(1).run(to_megatron, model, megatron)
    pools(2).run(to_hugging_face, megatron, back)
    same_files(model, back)


@pytest.mark.parametrize(
    "edit",
    [lambda t: t[-1].add_(1e-6), lambda t: t.resize_(5), lambda t: t.neg_()],
    ids=["one row", "another size", "signs"],
)
def test_a_tensor_that_differs_in_two_shards(copy, edit):
    """transformers would take the last shard's, whatever the index says."""
    model = copy("shards")
    indexed, other = put_twice(model, edit)
    refused(model, f"tensor {NORM} is in", model / indexed, model / other, "the two differ")


def test_an_index_that_names_another_shard(copy):
    model = copy("shards")
    index = weight_map(model)
    other = next(file for file in index.values() if file != index[NORM])
    (model / INDEX).write_text(json.dumps({"weight_map": index | {NORM: other}}))
    refused(model, f"lists {NORM} in {other}, which does not have it; {index[NORM]} has it")


def test_shards_in_a_subfolder(copy):
    model = copy("shards")
    index = weight_map(model)
    (model / "sub").mkdir()
    for file in set(index.values()):
        shutil.move(model / file, model / "sub" / file)
    refused(model, f"{sorted(index.values())[0]} is missing; there is one in sub/", "next to")
    inside = {name: f"sub/{file}" for name, file in index.items()}
    (model / INDEX).write_text(json.dumps({"weight_map": inside}))
    refused(model, "names 'sub/model-0000", "a file in a subfolder", "move all shards next to the index")


# A configuration that leaves tensors unused.


def load_changed(rank, directory, changes):
    """Load a model with a changed architecture and return the error message."""
    groups = _models.groups_for({"pipeline_model_parallel_size": 2})
    path = find_checkpoint(directory, "student.load")
    model = _models.replace_model(read_architecture(path, "student.load"), **changes)
    chunks = build_model(model, groups, "float32", max_sequence_length=64)
    try:
        load_weights(chunks, path, groups, "student.load", model)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    "changes", [{"qk_layernorm": False}, {"num_layers": 2}, {"add_qkv_bias": True}], ids=str
)
def test_tensors_that_the_configured_model_leaves_unused(originals, pools, changes):
    """Keys of the section `student` may change a loaded architecture, but must not drop weights."""
    said = pools(2).run(load_changed, originals / "single", changes)
    adds = "add_qkv_bias" in changes
    assert ("has nothing for" if adds else "does not match the configured model") in said[0], said
    pools(1).run(to_megatron, originals / "single", originals / "converted")
    said = pools(2).run(load_changed, originals / "converted", changes)
    assert said[0] == said[1] and "does not match the configured model" in said[0], said
    assert pools(2).run(load_changed, originals / "converted", {}) == [None, None]
