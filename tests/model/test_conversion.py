"""Hugging Face -> Megatron -> Hugging Face preserves every byte, and the checkpoint loads in any layout."""

import dataclasses
import filecmp
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_mopd.config import ConfigError
from megatron_mopd.model.background_save import write_checkpoint
from megatron_mopd.model.build import build_model
from megatron_mopd.model.checkpoint import (
    find_checkpoint,
    model_state,
    publish_checkpoint,
    read_architecture,
)
from megatron_mopd.model.convert import MegatronCheckpoint, write_hugging_face, write_megatron
from megatron_mopd.model.families import FAMILIES, computes, matching_family
from megatron_mopd.model.hugging_face import HuggingFaceCheckpoint
from megatron_mopd.model.initialize import sharded_tensors
from megatron_mopd.model.safetensors_files import parse_size
from megatron_mopd.model.streamed_checkpoint import Chunk, write_chunks
from tests import _models
from tests.model import _families, _running
from tests.model.test_families import ep, pp, tp


def to_megatron(rank, hf, output, dtype=None):
    write_megatron(HuggingFaceCheckpoint.open(hf, "--hf"), Path(output), dtype=dtype)


def to_hugging_face(rank, checkpoint, output, dtype=None, max_shard_size=None):
    source = MegatronCheckpoint(find_checkpoint(checkpoint, "--checkpoint"), "--checkpoint")
    write_hugging_face(source, Path(output), dtype=dtype, max_shard_size=max_shard_size)


def same_files(left: Path, right: Path) -> None:
    names = sorted(file.name for file in left.iterdir())
    assert names == sorted(file.name for file in right.iterdir())
    for name in names:
        assert filecmp.cmp(left / name, right / name, shallow=False), name


def add_tokenizer(directory: Path) -> None:
    """A small tokenizer with a chat template."""
    vocab = {chr(97 + i): i for i in range(26)} | {"<eos>": 26, "[UNK]": 27}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="[UNK]")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(directory)


@pytest.mark.parametrize("ranks, case", enumerate(_families.CASES), ids=lambda value: str(value))
def test_there_and_back_is_bitwise_equal(ranks, case, tmp_path, pools):
    """Whole files (names, headers, dtypes, order): 1 to 3 ranks, one or several files, fp32 and bf16."""
    ranks = ranks % 3 + 1
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    dtype = torch.bfloat16 if case.startswith(("qwen3", "glm")) else torch.float32
    _families.make(case, hf, dtype, max_shard_size="60KB" if ranks > 1 else "5GB")
    assert len(list(hf.glob("*.safetensors"))) == 1 or ranks > 1
    add_tokenizer(hf)
    pools(ranks).run(to_megatron, hf, megatron)
    pools(ranks % 3 + 1).run(to_hugging_face, megatron, back)
    same_files(hf, back)
    assert not list(tmp_path.glob(".*")) and not list(megatron.glob(".*"))


def weights_of(rank, directory, parallel):
    _, _, chunks = _running.load(directory, parallel, "float32", frozen=False)
    return {
        f"{number}.{name}": tensor.detach().clone()
        for number, chunk in enumerate(chunks)
        for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers())
        if "local_tokens" not in name
    }


@pytest.mark.parametrize(
    "ranks, case, layout",
    [
        (1, "llama", {}),
        (2, "qwen3-moe", tp(2)),
        (2, "glm4-moe", pp(2, 2)),
        (4, "deepseek-v3", tp(2) | pp(2) | ep(2)),
        (4, "qwen3-moe-dense-layers-plain-topk", ep(4)),
        (4, "mixtral", tp(2) | ep(4)),
    ],
    ids=str,
)
def test_a_converted_checkpoint_gives_the_weights_that_the_directory_gives(
    ranks, case, layout, tmp_path, pools
):
    """megatron-core's loader reads the converted checkpoint; each rank reads its slices of the directory."""
    hf, megatron = tmp_path / "hf", tmp_path / "megatron"
    _families.make(case, hf)
    pools(2).run(to_megatron, hf, megatron)
    direct = pools(ranks).run(weights_of, hf, layout)
    converted = pools(ranks).run(weights_of, megatron, layout)
    for ours, theirs in zip(direct, converted, strict=True):
        assert ours.keys() == theirs.keys() and ours
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name


def train_twice(rank, directory, parallel, first, second):
    """As training does: load and save a checkpoint; then another run from that checkpoint with two saves."""
    groups, model, chunks = _running.load(directory, parallel, "float32", frozen=False)
    for start, output, iteration in ((directory, first, 1), (first, second, 1), (first, second, 2)):
        model = dataclasses.replace(model, load=str(start))
        state = model_state(chunks, groups)
        write_checkpoint(Path(output), iteration, state, model, "none", lambda _: None)


def test_training_runs_hand_on_what_came_with_the_model(tmp_path, pools):
    """Tokenizer, templates and untrained tensors survive two runs in another layout and the export."""
    hf, first, second, back = (tmp_path / name for name in ("hf", "first", "second", "back"))
    _families.make("deepseek-v3", hf, max_shard_size="60KB")
    add_tokenizer(hf)
    add_untrained_layer(hf)
    pools(2).run(train_twice, hf, tp(2), first, second)
    pools(2).run(to_hugging_face, second, back)
    same_files(hf, back)


STORED_BESIDE = """
    model.onnx_data onnx/model.onnx original/consolidated.00.pth model.gguf tf_model.h5 flax_model.msgpack
    rust_model.ot model.tflite openvino_model.xml coreml/model.mlmodel adapter_model.bin.zip model.tar.gz
    weights.zip data.7z train.log train.log.1 events.out.tfevents.1 optimizer.pt scheduler.pt rng_state_0.pth
    training_args.bin global_step10/mp_rank_00_model_states.pt data.parquet results.csv log.txt
    trainer_state.json wandb/files/output.md pytorch_model.bin.index.json consolidated.safetensors
""".split()


def test_what_is_stored_beside_a_model_stays_out_of_runs_and_exports(tmp_path, pools):
    """Weights of other programs, optimizer states, archives and logs; a large tokenizer is copied."""
    hf, first, second, back = (tmp_path / name for name in ("hf", "first", "second", "back"))
    _families.make("llama", hf)
    add_tokenizer(hf)
    (hf / "vocab.json").write_text(json.dumps(dict.fromkeys(map(str, range(200_000)), 0)))
    belongs = {file.name for file in hf.iterdir()}
    for name in STORED_BESIDE:
        (hf / name).parent.mkdir(parents=True, exist_ok=True)
        with open(hf / name, "wb") as stream:
            stream.truncate(2 * 10**6 if name.endswith((".txt", ".json", ".md")) else 3 * 10**9)  # sparse
    pools(1).run(train_twice, hf, {}, first, second)
    pools(1).run(to_hugging_face, second, back)
    assert {str(file.relative_to(back)) for file in back.rglob("*") if file.is_file()} == belongs
    for run in (first, second):
        there = {file.name for file in run.rglob("*") if file.is_file()}
        assert "vocab.json" in there and not there & {Path(name).name for name in STORED_BESIDE}


def add_untrained_layer(hf: Path) -> None:
    """Add a multi-token-prediction layer after the last layer, as in DeepSeek-V3's files."""
    name = "model-extra.safetensors"
    tensors = {
        "model.layers.4.eh_proj.weight": torch.randn(32, 64),
        "model.layers.4.enorm.weight": torch.ones(32, dtype=torch.bfloat16),
    }
    save_file(tensors, hf / name, metadata={"format": "pt"})
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, name)
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))


def test_dtype_and_shard_size(tmp_path, pools):
    """Cast to bf16 (the router's bias stays fp32), split into shards of limited size, and loadable."""
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    _families.make("glm4-moe", hf)
    add_tokenizer(hf)
    pools(1).run(to_megatron, hf, megatron)
    pools(2).run(to_hugging_face, megatron, back, torch.bfloat16, parse_size("40kB"))
    files = sorted(back.glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 60_000 for file in files)
    original = load_file(hf / "model.safetensors")
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == original.keys()
    for name, tensor in found.items():
        wanted = original[name] if "correction_bias" in name else original[name].bfloat16()
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
    model = AutoModelForCausalLM.from_pretrained(back)
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(back).chat_template
    # To Megatron in bf16 and back to Hugging Face in fp32.
    pools(1).run(to_megatron, hf, tmp_path / "half", torch.bfloat16)
    pools(1).run(to_hugging_face, tmp_path / "half", tmp_path / "single", torch.float32)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "single").dtype == torch.float32


def save_new_model(rank, transformer, output):
    """Save a new model with a padded vocabulary, without starting megatron-core's writer."""
    groups = _models.groups_for({})
    model = _models.model_config(transformer)
    chunks = build_model(model, groups, "float32", max_sequence_length=64, seed=3)

    def write(partial):
        state = model_state(chunks, groups)
        write_chunks(partial, [_chunk_of(sharded) for sharded in sharded_tensors(state)])

    publish_checkpoint(Path(output), 5, write, model, "none", None)


def _chunk_of(sharded) -> Chunk:
    sizes = (1,) * sharded.prepend_axis_num + tuple(sharded.data.shape)
    data = sharded.data.detach()
    return Chunk(sharded.key, sharded.global_shape, sharded.global_offset, sizes, data.dtype, lambda: data)


def test_a_model_trained_from_scratch_becomes_the_architecture_that_fits(tmp_path, pools):
    """A mixture of experts is exported as Qwen3-MoE without padding and computes the same there."""
    run, out = tmp_path / "run", tmp_path / "out"
    pools(1).run(save_new_model, _models.MOE, run)
    pools(2).run(to_hugging_face, run, out)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]
    rows = [[1, 5, 80, 3, 9], [7, 7, 2]]
    expected = _families.reference_logits(out, rows, torch.float32)
    ((padded, _),) = pools(1).run(_running.logits, run, {}, "float32", rows)
    for row, (positions, values) in padded.items():
        assert (values - expected[row][positions]).abs().max() < 1e-4


@pytest.mark.parametrize("case", _families.CASES)
def test_configuration_there_and_back(case):
    """A model configuration written as its family's `config.json` is read back as the same model."""
    model_type, values = _families.CASES[case]
    family = FAMILIES[model_type]
    model = family.model_config(AutoConfig.for_model(model_type, **values), "test")
    written = AutoConfig.for_model(**family.hugging_face_config(model))
    assert computes(family.model_config(written, "test")) == computes(model)
    assert computes(matching_family(model, "test").model_config(written, "test")) == computes(model)


def test_a_model_without_an_architecture_is_refused():
    with pytest.raises(ConfigError, match="no supported Hugging Face architecture computes this model"):
        matching_family(_models.model_config(_models.GQA | dict(activation_func="gelu")), "--checkpoint")


def test_architecture_is_read_from_either_format(tmp_path, pools):
    hf, megatron = tmp_path / "hf", tmp_path / "megatron"
    _families.make("qwen3", hf)
    pools(1).run(to_megatron, hf, megatron)
    paths = (find_checkpoint(path, "test") for path in (hf, megatron, megatron / "iter_0000000"))
    first, *others = [read_architecture(path, "test") for path in paths]
    assert others == [first, first]
