"""Reading a configuration: types, unknown keys and the nearest known one, overrides, invalid YAML."""

from __future__ import annotations

import dataclasses
import math
import re
import typing

import pytest

from megatron_mopd.config import Config, ConfigError, load_config, save_config, schema
from megatron_mopd.config.loading import config_from_dict, to_dict
from megatron_mopd.config.value_types import type_name, without_null

FULL = """
run_dir: run
params_dtype: bfloat16
student:
  num_layers: 4
  hidden_size: 64
  num_attention_heads: 4
  num_moe_experts: 8
  moe_layer_freq: [0, 1, 1, 1]
teachers:
  - {name: math, load: /experts/math}
  - {name: self}
routing:
  math: {math: 0.7, self: 0.3}
  default: self
data:
  prompts:
    - {path: a.jsonl, weight: 2}
    - {task: gcd, params: {max_num: 30}}
rollout: {stop_token_ids: [7, 8]}
objective:
  per_domain:
    math: {kind: forward_kl}
    code: sampled_token
optimizer: {lr: 1e-4, clip_grad: 1}
parallel: {tensor_model_parallel_size: 2, sequence_parallel: true}
"""


def load(tmp_path, text, *overrides):
    (tmp_path / "c.yaml").write_text(text)
    return load_config(tmp_path / "c.yaml", overrides)


def test_every_kind_of_value(tmp_path):
    config = load(tmp_path, FULL)
    assert config.student.transformer == dict(
        num_layers=4, hidden_size=64, num_attention_heads=4, num_moe_experts=8, moe_layer_freq=[0, 1, 1, 1]
    )
    assert [(t.name, t.load) for t in config.teachers] == [("math", "/experts/math"), ("self", None)]
    assert config.routing == {"math": {"math": 0.7, "self": 0.3}, "default": "self"}
    assert [(p.path, p.task, p.weight) for p in config.data.prompts] == [
        ("a.jsonl", None, 2.0),
        (None, "gcd", 1),
    ]
    assert config.objective.per_domain == {"math": {"kind": "forward_kl"}, "code": {"kind": "sampled_token"}}
    assert config.optimizer.lr == 1e-4, "YAML 1.1 reads 1e-4 as a string"
    assert isinstance(config.optimizer.clip_grad, float) and isinstance(config.data.prompts[0].weight, float)
    assert config.rollout.stop_token_ids == [7, 8]
    assert config.parallel.sequence_parallel is True
    assert config.schedule == Config().schedule, "omitted sections must have their defaults"


def test_saved_and_read_again_it_is_the_same(tmp_path):
    config = load(tmp_path, FULL, "seed=5", "teacher_storage.mode=mmap")
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert to_dict(config_from_dict(to_dict(config))) == to_dict(config)


def test_overrides(tmp_path):
    config = load(
        tmp_path,
        FULL,
        "optimizer.lr=3",
        "student.num_layers=8",
        "rollout.stop_token_ids=[1]",
        "objective.per_domain.math.kind=jsd",
        "data.eval=[{task: lcm, size: 3}]",
        "student.load=null",
        "run_dir=a=b",
    )
    assert config.optimizer.lr == 3.0 and config.student.transformer["num_layers"] == 8
    assert config.rollout.stop_token_ids == [1]
    assert config.objective.per_domain["math"]["kind"] == "jsd"
    assert config.data.eval[0].task == "lcm" and config.data.eval[0].size == 3
    assert config.student.load is None and config.run_dir == "a=b"
    assert load_config(None, ["run_dir=x"]).run_dir == "x"


def test_fields_of_megatron_core_are_as_the_user_wrote_them():
    written = dict(layernorm_epsilon="1e-6", moe_aux_loss_coeff=1, q_lora_rank=None, softmax_scale=None)
    model = config_from_dict({"run_dir": "x", "student": written}).student
    assert model.transformer == written | {"layernorm_epsilon": 1e-6}
    assert type(model.transformer["moe_aux_loss_coeff"]) is int, "a checkpoint's fingerprint depends on it"


def test_every_text_may_come_from_the_environment():
    """A plain `str` would lose `interpolation.EnvironmentText`, which marks values that must not be shown."""
    texts = {
        f"{cls.__name__}.{name}": hint
        for cls in vars(schema).values()
        if dataclasses.is_dataclass(cls)
        for name, hint in typing.get_type_hints(cls, include_extras=True).items()
        if type_name(without_null(hint)) == "str"
    }
    assert {"Config.run_dir", "LogConfig.wandb_name", "DataConfig.date"} <= texts.keys()
    for key, hint in texts.items():
        assert "InstanceOf" in str(hint), f"{key}: declare it as Text"


def test_read_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3


@pytest.mark.parametrize(
    "section, message",
    [
        ({"optimizer": {"learning_rate": 1}}, "unknown key 'optimizer.learning_rate'"),
        ({"optimizer": {"weight_decai": 1}}, "'optimizer.weight_decai'; did you mean 'weight_decay'?"),
        ({"paralel": {}}, "'paralel'; did you mean 'parallel'?"),
        ({"teachers": [{"name": "a", "lod": "x"}]}, "'teachers[0].lod'; did you mean 'load'?"),
        ({"data": {"prompts": [{}, {"pth": "x"}]}}, "'data.prompts[1].pth'; did you mean 'path'?"),
        ({"student": {"moe_router_top_k": 2}}, "'student.moe_router_top_k'; did you mean 'moe_router_topk'?"),
        ({"student": {"transformer": {"num_layers": 2}}}, "unknown key 'student.transformer'"),
        ({"student": {"tensor_model_parallel_size": 2}}, "set parallel.tensor_model_parallel_size instead"),
        ({"student": {"bf16": True}}, "student.bf16: set params_dtype instead"),
        (
            {"objective": {"per_domain": {"a": {"kid": "jsd"}}}},
            "'objective.per_domain.a.kid'; did you mean 'kind'?",
        ),
        ({"objective": {"per_domain": {"a": {"reduction": "token_mean"}}}}, "set objective.reduction"),
        ({"seed": "one"}, "seed: expected int, found 'one'"),
        ({"seed": 1.0}, "seed: expected int, found 1.0"),
        ({"seed": True}, "seed: expected int, found True"),
        ({"seed": None}, "seed: expected int, found None"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr: expected float, found 'fast'"),
        ({"optimizer": {"lr": True}}, "optimizer.lr: expected float, found True"),
        ({"log": {"report": 1}}, "log.report: expected bool, found 1"),
        ({"log": {"report": "yes"}}, "log.report: expected bool, found 'yes'"),
        ({"run_dir": 3}, "run_dir: expected str, found 3; quote it in YAML"),
        (
            {"data": {"prompts": [{"domain": False}]}},
            "data.prompts[0].domain: expected str, found False; quote",
        ),
        ({"run_dir": "a\ud83d"}, "run_dir: not valid Unicode: half a character at position 1"),
        ({"parallel": {"distributed_timeout_minutes": 1e30}}, "distributed_timeout_minutes: must be"),
        ({"rewards": {"timeout_seconds": math.inf}}, "rewards.timeout_seconds: must be"),
        ({"guard": {"hang_timeout_minutes": -1}}, "guard.hang_timeout_minutes: must be"),
        ({"optimizer": {"weight_decay": -0.5}}, "optimizer.weight_decay: must be at least 0"),
        ({"optimizer": {"adam_eps": 0}}, "optimizer.adam_eps: must be above 0"),
        ({"optimizer": {"min_lr": 1.0}}, "optimizer.min_lr: 1 is above optimizer.lr="),
        ({"optimizer": {"min_lr": -1.0}}, "optimizer.min_lr: must be at least 0"),
        ({"optimizer": {"lr": math.nan}}, "optimizer.lr: must be at least 0"),
        (
            {"parallel": {"virtual_pipeline_model_parallel_size": -1}},
            "parallel.virtual_pipeline_model_parallel_size: must be at least 1, found -1",
        ),
        ({"schedule": {"max_activations": -1}}, "schedule.max_activations: must be at least 0, found -1"),
        ({"student": {"rotary_base": 0}}, "student.rotary_base: must be above 0"),
        ({"optimizer": {"lr": 10**5000}}, "optimizer.lr: a whole number of"),
        ({"recipes": 10**5000}, "unknown key 'recipes'; did you mean 'recipe'?"),
        ({"optimizer": {"lr_warmup_init": 1.0}}, "optimizer.lr_warmup_init: 1 is above optimizer.lr="),
        ({"seed": 10**5000}, "seed: a whole number of 16610 bits is out of range"),
        ({"optimizer": {"lr": 10**400}}, "optimizer.lr: a whole number of 1329 bits is out of range"),
        (
            {"rollout": {"stop_token_ids": [1, -(2**64)]}},
            "rollout.stop_token_ids[1]: -18446744073709551616 is",
        ),
        ({"routing": {"\udc00": "x"}}, "routing: not valid Unicode: half a character at position 0"),
        ({"student": {"activation_func": 1.5}}, "student.activation_func: expected str, found 1.5"),
        ({"teachers": {"name": "a"}}, "teachers: expected a list"),
        ({"teachers": ["a"]}, "teachers[0]: expected a section with keys, found 'a'"),
        ({"routing": ["a"]}, "routing: expected a mapping"),
        ({"schedule": 3}, "schedule: expected a section with keys, found 3"),
        ({"rollout": {"stop_token_ids": [1, "a"]}}, "rollout.stop_token_ids[1]: expected int, found 'a'"),
        ({"device": "tpu"}, "device: 'tpu' is not one of auto, cpu, cuda"),
        ({"schedule": {"micro_batch_size": 0}}, "schedule.micro_batch_size: must be at least 1, found 0"),
        ({"schedule": {"steps_per_rollout": 3}}, "schedule.train_iters: 100 is not a multiple of"),
        ({"rollout": {"top_p": 0.0}}, "rollout.top_p: must be above 0 and at most 1, found 0.0"),
        ({"rollout": {"temperature": float("nan")}}, "rollout.temperature: must be at least 0, found nan"),
        ({"rollout": {"repetition_stop": 1}}, "rollout.repetition_stop: every token is a pattern once"),
        ({"evaluation": {"pass_at": [1, 0]}}, "evaluation.pass_at[1]: must be at least 1, found 0"),
        ({"data": {"date": "today"}}, "data.date: 'today' is not a day, YYYY-MM-DD"),
        ({"teacher_storage": {"mode": "hosts"}}, "host, host_sharded, mmap; did you mean 'host'?"),
        ({"objective": {"add": {"jds": 1}}}, "objective.add: 'jds' is not one of full_vocab_kl"),
        (
            {"objective": {"per_domain": {"a": {"shaping": 2}}}},
            "objective.per_domain.a.shaping: must be above 0 and at most 1, found 2",
        ),
        ({"objective": {"per_domain": {"a": ["jsd"]}}}, "objective.per_domain.a: expected a section with"),
        ({"optimizer": {3: 1}}, "unknown key 'optimizer.3'"),
        ({"student": {"num_layers": "4"}}, "student.num_layers: expected int, found '4'"),
        ({"student": {"num_layers": True}}, "student.num_layers: expected int, found True"),
        ({"student": {"moe_layer_freq": [1, "a"]}}, "expected int or list of int, found a list"),
        ({"student": {"recompute_method": "x"}}, "expected 'uniform' or 'block' or null, found 'x'"),
        ({"student": {"timers": 3}}, "student.timers: is a function of megatron-core's"),
        ({"student": {"layernorm_epsilon": "x"}}, "student.layernorm_epsilon: expected float, found 'x'"),
        ({"params_dtype": "float64"}, "use_distributed_optimizer=false"),
        ({"run_dir": ""}, "run_dir: missing"),
        ({"optimizer": {"adam_beta2": 1.0}}, "optimizer.adam_beta2: must be at least 0 and below 1"),
        ({"parallel": {"expert_tensor_parallel_size": 0}}, "parallel.expert_tensor_parallel_size: must be"),
    ],
)
def test_mistakes_name_the_key(section, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        config_from_dict({"run_dir": "x"} | section)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("a: [1", (), "not readable as YAML"),
        ("a: b: c", (), "not readable as YAML"),
        ("seed: 1\nseed: 2", (), "not readable as YAML"),
        ("\tseed: 1", (), "not readable as YAML"),
        ("- 1\n- 2", (), "c.yaml"),
        ("seed: ${nowhere}", (), "nowhere"),
        (
            "run_dir: x\nrouting:\n  no: e",
            (),
            'line 3, column 3: YAML reads the key no as false; quote it: "no"',
        ),
        ("routing: {On: e}", (), 'column 11: YAML reads the key On as true; quote it: "On"'),
        ("routing: {null: e}", (), 'YAML reads the key null as null; quote it: "null"'),
        ("routing: {~: e}", (), 'quote it: "~"'),
        ("routing: {1e3: e}", (), 'YAML reads the key 1e3 as a number; quote it: "1e3"'),
        ("routing: {1.10: e}", (), 'YAML reads the key 1.10 as a number; quote it: "1.10"'),
        ("routing: {0x10: e}", (), 'quote it: "0x10"'),
        ("objective: {per_domain: {off: sft}}", (), 'YAML reads the key off as false; quote it: "off"'),
        ("routing: {[a, b]: e}", (), "column 11: the key is a list or a section"),
        ("seed: " + 5000 * "1", (), "a number of thousands of digits"),
        ("seed: " + 3000 * "[", (), "c.yaml: not readable as YAML"),
        ("run_dir: x", ("seed",), "'seed' is not of the form section.key=value"),
        ("run_dir: x", ("sed=1",), "'sed'; did you mean 'seed'?"),
        ("run_dir: x", ("seed=[1",), "c.yaml"),
    ],
)
def test_mistakes_in_files_and_overrides(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(raised.value)


def test_names_that_look_like_numbers(tmp_path):
    text = """run_dir: x\nrouting: {1: e, "no": e, '1e3': e, 2024-01-01: e, y: e}"""
    assert list(load(tmp_path, text).routing) == ["1", "no", "1e3", "2024-01-01", "y"]


def test_keys_of_what_is_no_configuration_are_not_quoted(tmp_path):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, "no: hunter2")
    assert "hunter2" not in str(raised.value) and "quote" not in str(raised.value)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00seed")
    for path in (tmp_path / "c.yaml", tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=re.escape(str(path))) as raised:
            load_config(path)
        assert "\n" not in str(raised.value)
