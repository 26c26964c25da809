"""A training run whose student and teachers are Hugging Face directories, exported to one again."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_mopd.config import config_from_dict
from megatron_mopd.model.convert import open_checkpoint, write_hugging_face
from megatron_mopd.train import train
from tests._distributed import run_ranks
from tests.model import _families
from tests.model.test_conversion import add_tokenizer


def one_iteration(rank, student, teacher, prompts, run_dir, output):
    config = config_from_dict(
        {
            "run_dir": str(run_dir),
            "device": "cpu",
            "student": {"load": str(student)},
            "teachers": [{"name": "expert", "load": str(teacher)}, {"name": "self"}],
            "routing": {"letters": "expert", "default": "self"},
            "data": {"tokenizer": str(student), "seq_length": 32, "prompts": [{"path": str(prompts)}]},
            "rollout": {"max_new_tokens": 6},
            "schedule": {"train_iters": 1, "global_batch_size": 4, "micro_batch_size": 2},
            "optimizer": {"lr": 1e-2, "lr_warmup_iters": 0},
            "parallel": {"tensor_model_parallel_size": 2},
            "log": {"report": False, "tensorboard": False},
        }
    )
    metrics = train(config)
    write_hugging_face(open_checkpoint(Path(run_dir) / "checkpoints", "--checkpoint"), Path(output))
    return metrics


def test_from_hugging_face_to_hugging_face(tmp_path):
    student, teacher, out = tmp_path / "student", tmp_path / "teacher", tmp_path / "out"
    _families.make("qwen3", student, max_shard_size="60KB")
    _families.make("qwen3", teacher, seed=5)
    for directory in (student, teacher):
        add_tokenizer(directory)
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": word, "domain": domain} for word in ("ab", "cde", "f") for domain in ("letters", "more")
    ]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    metrics = run_ranks(2, one_iteration, student, teacher, prompts, tmp_path / "run", out, timeout=200)[0]
    # The expert differs from the student; `self`, read from the same directory, equals it.
    assert metrics["kl/letters"] > 0.1 and abs(metrics["kl/more"]) < 1e-5
    assert math.isfinite(metrics["loss"])
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in student.iterdir())
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (student / name).read_bytes()
    for file in out.glob("*.safetensors"):
        before, after = load_file(student / file.name), load_file(file)
        for name, tensor in after.items():
            assert not torch.equal(tensor, before[name]), name
            assert tensor.shape == before[name].shape and tensor.dtype == before[name].dtype
