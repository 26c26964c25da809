"""User errors with checkpoints: one message that names the error, and no output left behind."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mopd.config import ConfigError
from megatron_mopd.model.checkpoint import find_checkpoint
from megatron_mopd.model.convert import (
    MegatronCheckpoint,
    open_checkpoint,
    require_empty,
    write_hugging_face,
    write_megatron,
)
from megatron_mopd.model.hugging_face import HuggingFaceCheckpoint
from megatron_mopd.model.safetensors_files import named_dtype, parse_size
from tests._distributed import RankError, run_ranks
from tests.model import _families
from tests.model.test_conversion import add_tokenizer, same_files

TOOLS = Path(__file__).parents[2] / "tools"
PROJECTION = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A sharded Qwen3 with a tokenizer."""
    directory = tmp_path_factory.mktemp("original")
    _families.make("qwen3", directory, max_shard_size="60KB")
    add_tokenizer(directory)
    return directory


@pytest.fixture
def model(original, tmp_path):
    """A copy of `original` for tests to damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def refused(path, *parts, where="student.load"):
    """Assert that opening `path` fails with a one-line message that contains all `parts`."""
    with pytest.raises(ConfigError) as error:
        HuggingFaceCheckpoint.open(path, where)
    message = str(error.value)
    assert message.startswith(f"{where}: ") and "\n" not in message
    for part in parts:
        assert part in message, message


def edit(model, change) -> None:
    """Apply `change` to the tensors of the file that holds `PROJECTION`."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    path = model / index["weight_map"][PROJECTION]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != path.name or n in tensors}
    index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def configure(model, **changes) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def test_the_model_itself_is_fine(model):
    HuggingFaceCheckpoint.open(model, "student.load")


def test_unsupported_architecture(model):
    configure(model, model_type="gpt_bigcode", architectures=["GPTBigCodeForCausalLM"])
    refused(model, "'gpt_bigcode' is not supported", "Qwen3ForCausalLM (qwen3)", "DeepseekV3ForCausalLM")


def test_missing_shard(model):
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    refused(model, f"{shard} is missing")


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_shard(model, keep):
    path = sorted(model.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:keep])
    refused(model, f"{path} is truncated")


def test_unexpected_shape(model):
    edit(model, lambda tensors: tensors.update({PROJECTION: torch.zeros(64, 31)}))
    refused(model, PROJECTION, "has shape [64, 31], expected [64, 32]", ".safetensors")


def test_missing_tensor(model):
    edit(model, lambda tensors: tensors.pop(PROJECTION))
    refused(model, f"tensor {PROJECTION} is missing")


def test_unexpected_tensor(model):
    edit(model, lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}))
    refused(model, "unexpected tensor model.layers.1.self_attn.q_proj.bias in ")


def test_index_that_does_not_match_its_files(model):
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][PROJECTION])
    index["weight_map"][PROJECTION] = other
    path.write_text(json.dumps(index))
    refused(model, f"lists {PROJECTION} in {other}")


def test_pickled_weights(model):
    for file in model.glob("*safetensors*"):
        file.unlink()
    refused(model, "no weights")
    torch.save({}, model / "pytorch_model.bin")
    refused(model, "pytorch_model.bin holds pickled weights", "safetensors")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(quantization_config={"quant_method": "fp8"}), "quantized"),
        (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (dict(use_sliding_window=True, sliding_window=16, max_window_layers=0), "sliding-window"),
        (
            dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type 'dynamic' is not one of",
        ),
        (dict(model_type="olmoe", clip_qkv=8.0), "clip_qkv is not supported"),
        (dict(model_type="olmoe", head_dim=16), "attention heads must be as wide together as hidden_size"),
        (dict(num_hidden_layers="many"), "config.json"),
    ],
    ids=str,
)
def test_settings_that_nothing_here_computes(model, changes, message):
    configure(model, **changes)
    refused(model, message)


@pytest.mark.parametrize("theta", [[10000.0], {"a": 1}, "many"])
def test_a_value_of_another_type(model, theta):
    configure(model, rope_parameters={"rope_type": "default", "rope_theta": theta})
    refused(model, "config.json")


def test_damaged_configuration(model):
    (model / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        find_checkpoint(model, "student.load")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(norm_topk_prob=False), "norm_topk_prob=false"),
        (dict(num_experts_per_tok=3), "must be twice topk_group=2"),
        (dict(rope_interleave=False), "rope_interleave=false"),
        (dict(attention_bias=True), "attention_bias=true"),
    ],
    ids=str,
)
def test_routers_and_attention_that_nothing_here_computes(tmp_path, changes, message):
    _families.make("deepseek-v3", tmp_path)
    configure(tmp_path, **changes)
    refused(tmp_path, message)


def test_quantized_tensor(model):
    edit(model, lambda tensors: tensors.update({PROJECTION: tensors[PROJECTION].to(torch.float8_e4m3fn)}))
    refused(model, PROJECTION, "is quantized")


def test_code_in_the_checkpoint_is_never_executed_and_stays_behind(model, tmp_path):
    marker, out, back = tmp_path / "executed", tmp_path / "out", tmp_path / "back"
    (model / "custom.py").write_text(f"open({str(marker)!r}, 'w')\nclass Custom: pass\n")
    auto_map = {"AutoConfig": "custom.Custom", "AutoModelForCausalLM": "custom.Custom"}
    configure(model, auto_map=auto_map)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    run_ranks(1, there_and_back, model, out, back)
    (model / "custom.py").unlink()
    same_files(model, back)
    (model / "custom.py").write_text("raise SystemExit")
    configure(model, auto_map=auto_map, model_type="custom")
    refused(model, "architecture 'custom' is not supported")
    assert not marker.exists()


def there_and_back(rank, hf, megatron, back):
    path = write_megatron(HuggingFaceCheckpoint.open(hf, "--hf"), Path(megatron))
    write_hugging_face(MegatronCheckpoint(path, "--checkpoint"), Path(back))


def test_output_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output: .* is not empty; .*--overwrite"):
        require_empty(tmp_path, overwrite=False)
    require_empty(tmp_path, overwrite=True)
    require_empty(tmp_path / "new", overwrite=False)
    for source in (tmp_path, tmp_path / "checkpoints" / "iter_0000001", tmp_path / "new" / ".."):
        with pytest.raises(ConfigError, match="--output: .* contains the model to be read"):
            require_empty(tmp_path, overwrite=True, source=source)
    require_empty(tmp_path / "new", overwrite=True, source=tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        require_empty(tmp_path / "file", overwrite=True)


class Breaks:
    """A source that fails after `after` tensors."""

    def __init__(self, source, after):
        self._source, self._left = source, after

    def __getattr__(self, name):
        return getattr(self._source, name)

    def _count(self):
        self._left -= 1
        if self._left < 0:
            raise OSError("the disk is gone")

    def whole(self, weight):
        self._count()
        return self._source.whole(weight)

    def hugging_face_tensors(self, weight):
        self._count()
        return self._source.hugging_face_tensors(weight)


def breaks_half_way(rank, source, output, write):
    source = Breaks(open_checkpoint(source, "--checkpoint"), after=5)
    try:
        write(source, Path(output))
    except Exception as error:
        return "the disk is gone" in str(error)
    return False


@pytest.mark.parametrize("write", [write_megatron, write_hugging_face])
def test_nothing_half_written_looks_finished(original, write, tmp_path):
    output = tmp_path / "output"
    assert run_ranks(1, breaks_half_way, original, output, write) == [True]
    visible = [file.name for file in output.glob("*") if not file.name.startswith(".")]
    assert not visible, visible
    with pytest.raises(ConfigError, match="--checkpoint"):
        open_checkpoint(output, "--checkpoint")


def test_damaged_checkpoints_of_ours(original, tmp_path):
    good = tmp_path / "good"
    run_ranks(1, there_and_back, original, good, tmp_path / "back")

    def spoiled(name, content):
        path = Path(shutil.copytree(good, tmp_path / name.replace("/", "-") / "x")) / "iter_0000000"
        (path / name).write_bytes(content)
        with pytest.raises(ConfigError) as error:
            source = open_checkpoint(path, "--checkpoint")
            for weight in source.weights:
                source.whole(weight)
        return str(error.value)

    assert "model.json is not readable" in spoiled("model.json", b"{")
    assert ".metadata cannot be read as" in spoiled(".metadata", b"no pickle")
    assert "layout.json is not readable" in spoiled("hugging_face/layout.json", b"[]")
    assert "is damaged" in spoiled("__0_0.distcp", b"")


@pytest.mark.parametrize(
    "name, source, others",
    [
        ("convert_hf_to_megatron.py", "--hf", ""),
        ("convert_megatron_to_hf.py", "--checkpoint", ""),
        ("upcycle_to_moe.py", "--checkpoint", "--num-experts 4 --topk 2 --format hf"),
    ],
)
def test_every_tool_leaves_what_is_in_the_output_alone(original, tmp_path, capfd, name, source, others):
    """Even with --overwrite if the output contains the model to be read."""
    output = Path(shutil.copytree(original, tmp_path / "output"))
    for arguments in (
        (source, original, "--output", output),
        (source, output, "--output", output, "--overwrite"),
        (source, output, "--output", tmp_path, "--overwrite"),
    ):
        with pytest.raises(RankError, match="exit code 2"):
            run_ranks(1, tool, name, *arguments, *others.split())
        message = capfd.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: --output: "), message
        assert ("is not empty" if "--overwrite" not in arguments else "to be read") in message
    same_files(original, output)


def test_overwriting_replaces_a_model_whole(original, tmp_path):
    """Existing weights of another size, other files and a later iteration are deleted."""
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    _families.make("llama", back, max_shard_size="20KB")
    (back / "left over.txt").write_text("")
    _families.make("llama", tmp_path / "other")
    run_ranks(1, tool, "convert_hf_to_megatron.py", "--hf", tmp_path / "other", "--output", megatron)
    (megatron / "iter_0000000").rename(megatron / "iter_0000007")
    run_ranks(1, tool, "convert_hf_to_megatron.py", "--hf", original, "--output", megatron, "--overwrite")
    run_ranks(1, tool, "convert_megatron_to_hf.py", "--checkpoint", megatron, "--output", back, "--overwrite")
    same_files(original, back)


def test_pickled_weights_beside_safetensors_are_not_read_and_stay_behind(model, tmp_path):
    for name in ("pytorch_model.bin", "old.pth", "training.ckpt"):
        (model / name).write_bytes(b"never read")
    out, back = tmp_path / "out", tmp_path / "back"
    run_ranks(1, there_and_back, model, out, back)
    for name in ("pytorch_model.bin", "old.pth", "training.ckpt"):
        (model / name).unlink()
    same_files(model, back)


def test_weights_in_an_index_must_be_safetensors(model):
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "pytorch_model.bin")
    path.write_text(json.dumps(index))
    torch.save({PROJECTION: torch.zeros(64, 32)}, model / "pytorch_model.bin")
    refused(model, "pytorch_model.bin", "not a safetensors file")


def test_sizes_and_dtypes():
    assert parse_size("5GB") == 5 * 10**9 and parse_size("1.5 GiB") == 1.5 * 2**30
    assert parse_size("12") == 12 and parse_size(None) is None and named_dtype(None) is None
    for text in ("", "GB", "-1GB", "5TBs", "nan"):
        with pytest.raises(ConfigError, match="--max-shard-size"):
            parse_size(text)
    with pytest.raises(ConfigError, match="--dtype: 'float16' is not one of"):
        named_dtype("float16")


def tool(rank, name, *arguments):
    """Run a tool in this rank as from the command line."""
    sys.argv = [name, *map(str, arguments)]
    sys.path.insert(0, str(TOOLS))
    runpy.run_path(str(TOOLS / name), run_name="__main__")


def test_the_tools(original, tmp_path, capfd):
    """Convert, upcycle, generate and convert back from the command line; a user error is one line."""
    megatron, back, moe = tmp_path / "megatron", tmp_path / "back", tmp_path / "moe"
    run_ranks(1, tool, "convert_hf_to_megatron.py", "--hf", original, "--output", megatron)
    run_ranks(1, tool, "convert_megatron_to_hf.py", "--checkpoint", megatron, "--output", back)
    same_files(original, back)
    run_ranks(
        1, tool, "upcycle_to_moe.py", *f"--checkpoint {back} --output {moe} --num-experts 4 --topk 2".split()
    )
    assert "Qwen3MoeForCausalLM" in capfd.readouterr().out
    answers = []
    for checkpoint in (original, megatron, moe):
        arguments = f"--checkpoint {checkpoint} --prompt abc --max-new-tokens 6 --device cpu".split()
        run_ranks(1, tool, "generate.py", *arguments)
        answers.append(capfd.readouterr().out)
    assert answers[0].strip() and answers == answers[:1] * 3
    with pytest.raises(RankError, match="exit code 2"):
        run_ranks(1, tool, "convert_hf_to_megatron.py", "--hf", original, "--output", back)
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith("error: --output: ")
