"""Models as they are published: embeddings with more rows than the tokenizer has tokens, several
end-of-sequence tokens, tokenizers saved by other releases, chat templates that print the date.
"""

from __future__ import annotations

import datetime
import json
import shutil

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from megatron_mopd.config import ConfigError, config_from_dict
from megatron_mopd.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_mopd.data.tokenizer_meaning import TokenizerMeaning
from megatron_mopd.rollout.stop_ids import read_stop_ids
from megatron_mopd.run import run_date
from megatron_mopd.run.inputs import check_inputs
from tests._runs import run_main
from tests.data.test_tokenizer import TEMPLATE, TEXTS, build_huggingface

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.1,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
)
TOKENS = 400
"""Tokens of the tokenizer; models have more rows."""


def write_model(directory, tokenizer, rows, seed):
    shutil.copytree(tokenizer, directory)
    config = transformers.AutoConfig.for_model("qwen3", vocab_size=rows, **SIZES)
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def with_rows(source, directory, rows):
    """Copy a model with `rows` embedding rows; the rows beyond the tokenizer would always be sampled."""
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tokens = tensors[name][:TOKENS]
        beyond = 50 * tokens[torch.arange(rows - TOKENS) % TOKENS]
        tensors[name] = torch.cat((tokens, beyond)).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | {"vocab_size": rows}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`student` and `expert` with exactly as many rows as tokens, and prompts."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = build_huggingface(root / "tokenizer")
    assert load_tokenizer(tokenizer).vocab_size == TOKENS
    for seed, name in enumerate(("student", "expert")):
        write_model(root / name, tokenizer, TOKENS, seed)
    lines = [
        {"prompt": f"{a} + {b} =", "answer": str(a + b), "domain": "math"} for a in range(3) for b in (1, 2)
    ]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def values(models, run_dir, student="student", expert="expert", **sections):
    merged = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "params_dtype": "float64",
        "student": {"load": str(models / student)},
        "teachers": [{"name": "expert", "load": str(models / expert), "kl_ceiling": 1e9}],
        "routing": {"default": "expert"},
        "data": {
            "tokenizer": str(models / "tokenizer"),
            "seq_length": 64,
            "prompts": [{"path": str(models / "prompts.jsonl")}],
        },
        "rollout": {"max_new_tokens": 8},
        "optimizer": {"lr": 1e-3, "use_distributed_optimizer": False},
        "schedule": {"train_iters": 1, "global_batch_size": 4, "micro_batch_size": 2},
        "log": {"tensorboard": False, "report": False},
    }
    for name, section in sections.items():
        merged[name] = merged.get(name, {}) | section
    return merged


def run(path, settings, world_size=1, *arguments):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    return run_main(["--config", str(path / "config.yaml"), *arguments], world_size)


def metrics(run_dir):
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])


def test_rows_beyond_the_tokenizer_take_no_part(models, tmp_path):
    """Losses, samples and gradients do not depend on the extra rows, their number or their sharding."""
    student = with_rows(models / "student", tmp_path / "student", 500)
    expert = with_rows(models / "expert", tmp_path / "expert", 640)
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "9 + 9 =", "answer": "18", "domain": "math"}')
    held_out = {"eval": [{"path": str(tmp_path / "held_out.jsonl")}]}
    exact, padded = tmp_path / "exact", tmp_path / "padded"
    data = values(models, exact)["data"] | held_out
    outcome = run(tmp_path / "a", values(models, exact, data=data))
    assert outcome.statuses == [0], outcome.printed
    parallel = {"tensor_model_parallel_size": 2}
    settings = values(models, padded, str(student), str(expert), data=data, parallel=parallel)
    outcome = run(tmp_path / "b", settings, 2)
    assert outcome.statuses == [0, 0], outcome.printed
    expected, found = metrics(exact), metrics(padded)
    for name in ("loss", "grad_norm", "response_length", "accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name
    assert "responses end with 1 '</s>' (tokenizer)" in outcome.printed


def test_a_teacher_with_fewer_rows_than_tokens_is_refused(models, tmp_path):
    config = json.loads((models / "expert" / "config.json").read_text()) | {"vocab_size": TOKENS - 1}
    shutil.copytree(models / "expert", tmp_path / "expert")
    (tmp_path / "expert" / "config.json").write_text(json.dumps(config))
    settings = config_from_dict(values(models, tmp_path / "run", expert=str(tmp_path / "expert")))
    with pytest.raises(ConfigError, match=r"teachers\.expert\.load: vocabulary of 399 tokens, .* has 400"):
        check_inputs(settings, 1)


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_ids_beyond_the_tokenizer_decode_to_nothing(kind, models, tmp_path):
    path = models / "tokenizer"
    if kind == "sentencepiece":
        train_sentencepiece(TEXTS, path := tmp_path / "t.model", 320)
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("answer 7")
    beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 267, 2**31, -1]
    assert tokenizer.decode([*ids[:2], *beyond, *ids[2:]]) == "answer 7"


def test_every_file_that_names_an_end_of_sequence_counts(models, tmp_path):
    tokenizer, student = load_tokenizer(models / "tokenizer"), tmp_path / "student"
    shutil.copytree(models / "student", student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"eos_token_id": 3}))
    (student / "generation_config.json").write_text('{"eos_token_id": [1, 4, 499]}')
    rollout = {"stop_token_ids": [5]}
    inputs = check_inputs(config_from_dict(values(models, tmp_path, str(student), rollout=rollout)), 1)
    assert inputs.stop_ids.sources == {
        1: ("tokenizer", "generation_config.json"),
        4: ("generation_config.json",),
        3: ("config.json",),
        5: ("rollout.stop_token_ids",),
    }
    assert inputs.stop_ids.described(tokenizer).startswith(
        "1 '</s>' (tokenizer, generation_config.json), 4 '<|assistant|>' (generation_config.json)"
    )
    for value, ids in (("null", [1]), ("4", [1, 4]), ("[]", [1]), ("-1", [1])):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
        assert list(read_stop_ids(tokenizer, [tmp_path], [])) == ids
    for value in ('"</s>"', "[true]", "[[1]]", "1.0"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
        with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is .* expected"):
            read_stop_ids(tokenizer, [tmp_path], [])


def test_another_tokenizer_is_refused_with_what_differs_unless_allowed(models, tmp_path, capsys):
    expert = tmp_path / "expert"
    shutil.copytree(models / "expert", expert)

    def check(**data):
        data = values(models, tmp_path)["data"] | data
        return check_inputs(config_from_dict(values(models, tmp_path, expert=str(expert), data=data)), 1)

    (expert / "chat_template.jinja").write_text(TEMPLATE + "\n")
    check()  # Jinja drops that newline
    assert (
        "teachers.expert.load: its chat template ends with a newline, which renders"
        in capsys.readouterr().out
    )
    (expert / "chat_template.jinja").write_text(TEMPLATE.replace("assistant|>", "assistant|> "))
    message = (
        r"teachers\.expert\.load: .* has a different tokenizer from data\.tokenizer: line 1 of its chat "
    )
    with pytest.raises(ConfigError, match=f"{message}.*continue with --allow-tokenizer-change"):
        check()
    check(allow_tokenizer_change=True)
    assert f"warning: teachers.expert.load: {expert} has a different tokenizer" in capsys.readouterr().out
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (expert / name).unlink()
    with pytest.raises(ConfigError, match="contains no tokenizer"):
        check()


class _Day(datetime.date):
    now = "2026-01-31"

    @classmethod
    def today(cls):
        return datetime.date.fromisoformat(cls.now)


def test_a_template_prints_the_day_of_the_first_start(models, tmp_path, monkeypatch):
    template = "{{ strftime_now('%d %B %Y') }} " + TEMPLATE
    for name in ("tokenizer", "student", "expert"):
        shutil.copytree(models / name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    line = {"prompt": [{"role": "user", "content": "1 + 1 ="}], "answer": "2", "domain": "math"}
    (tmp_path / "prompts.jsonl").write_text("\n".join([json.dumps(line)] * 4))
    tokenizer = load_tokenizer(tmp_path / "tokenizer", "2026-01-31")
    assert tokenizer.decode(tokenizer.encode_prompt(line["prompt"])).startswith("31 January 2026 ")

    monkeypatch.setattr(run_date.datetime, "date", _Day)
    for iterations, _Day.now in ((1, "2026-01-31"), (2, "2026-02-01")):
        settings = values(tmp_path, tmp_path / "run")
        settings["schedule"]["train_iters"] = iterations
        if iterations == 2:  # as if a new release computed fingerprints differently
            monkeypatch.setattr(TokenizerMeaning, "fingerprint", lambda self: "of another release")
        outcome = run(tmp_path / "settings", settings)
        assert outcome.statuses == [0], outcome.printed
        recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["date"]
        assert str(recorded) == "2026-01-31"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
