"""A resumed run treats every key of the configuration as its docstring says."""

from __future__ import annotations

import copy
import dataclasses
import json
import types
import typing

import pytest
from megatron.core.transformer import TransformerConfig

from megatron_mopd.config import Config, ConfigError, ModelConfig, config_from_dict, to_dict
from megatron_mopd.config.documentation import field_documentation
from megatron_mopd.config.resume import EXECUTION_FIELDS, ResumeClass, changes, split_documentation
from megatron_mopd.data.position import DataPosition
from megatron_mopd.run.resumable import FinishedRun, Resumable, check_same_run, say_changes, settings

BASE = {
    "run_dir": "here",
    "student": {"num_layers": 4, "recompute_method": "block", "load": "old/student", "vocab_size": 90},
    "teachers": [{"name": "math", "load": "old/math"}],
    "routing": {"default": "math"},
    "data": {
        "tokenizer": "old/tokenizer",
        "prompts": [{"path": "old/prompts.jsonl", "domain": "math"}],
        "eval": [{"path": "old/eval.jsonl"}],
    },
    "rollout": {"samples_per_prompt": 2},
    "schedule": {"train_iters": 8, "global_batch_size": 8},
    "checkpoint": {"save_interval": 4},
    "optimizer": {"use_distributed_optimizer": False},
}
PRINTS = {"tokenizer": "t", "prompts": ["p"], "student": "s", "teachers": {"math": {"weights": "m"}}}
OTHERS = {
    # Different values that the configuration accepts; `other_value` finds one by type for the other keys.
    "recipe": "glm5",
    "device": "cpu",
    "params_dtype": "float64",
    "routing": {"default": "math", "code": {"math": 1.0}},
    "student.position_embedding_type": "none",
    "student.rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "student.recompute_method": "uniform",
    "teachers[math].name": "algebra",
    "teacher_storage.mode": "mmap",
    "teacher_storage.dtype": "int8",
    "teacher_storage.hidden_cache_device": "device",
    "teacher_storage.hidden_cache_dtype": "float32",
    "parallel.sequence_parallel": True,
    "data.prompts[0].verifier": "math_verify",
    "data.eval[0].verifier": "math_verify",
    "rollout.top_p": 0.9,
    "objective.kind": "jsd",
    "objective.add": {"forward_kl": 0.5},
    "objective.apply_as": "loss",
    "objective.reduction": "sequence_mean",
    "objective.top_k_from": "student",
    "objective.policy_loss": "ppo_clip",
    "objective.proximal": "behaviour",
    "objective.rollout_correction": "tis",
    "objective.per_domain": {"math": {"kind": "jsd"}},
    "objective.future_discount": 0.5,
    "objective.beta": 0.25,
    "objective.shaping": 0.5,
    "optimizer.lr_decay_style": "cosine",
    "optimizer.adam_beta1": 0.5,
    "optimizer.adam_beta2": 0.5,
    "schedule.kind": "serial",
    "schedule.steps_per_rollout": 2,
    "evaluation.top_p": 0.5,
    "rewards.timeout_seconds": 2.0,
}


def section_in(hint: object) -> type | None:
    if dataclasses.is_dataclass(hint):
        return hint
    return next((found for argument in typing.get_args(hint) if (found := section_in(argument))), None)


def every_key(cls: type = Config, where: str = "") -> list[tuple[str, type, str]]:
    """(dotted key, class of its section, field) of every key of a configuration."""
    found, hints = [], typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        inner = section_in(hints[item.name])
        if cls is ModelConfig and item.name == "transformer":
            found += [(f"{where}num_layers", cls, item.name), (f"{where}recompute_method", cls, item.name)]
        elif inner is None:
            found.append((f"{where}{item.name}", cls, item.name))
        elif typing.get_origin(hints[item.name]) is list:
            label = "math" if item.name == "teachers" else "0"
            found += every_key(inner, f"{where}{item.name}[{label}].")
        else:
            found += every_key(inner, f"{where}{item.name}.")
    return found


KEYS = every_key()


def said_class(key: str, cls: type, field: str) -> ResumeClass:
    """The class in the docstring; keys below `data.eval` may change because the list may."""
    if key.startswith("data.eval["):
        return ResumeClass.MAY_CHANGE
    if key == "student.recompute_method":
        return ResumeClass.MAY_CHANGE  # as docs/configuration.md says about `EXECUTION_FIELDS`
    return split_documentation(field_documentation(cls)[field])[1]


def parts_of(key: str) -> list[str | int]:
    parts = key.replace("[math]", ".0").replace("[0]", ".0").split(".")
    return [int(part) if part.isdecimal() else part for part in parts]


def with_other_value(values: dict, key: str) -> tuple[dict, object, object]:
    """The complete configuration with a different value of one key, the old value and the new one."""
    changed = copy.deepcopy(values)
    *way, last = parts_of(key)
    place = changed
    for part in way:
        place = place[part]
    old = place[last]
    place[last] = OTHERS[key] if key in OTHERS else other_value(old)
    assert place[last] != old
    return changed, old, place[last]


def other_value(old: object) -> object:
    if isinstance(old, bool):
        return not old
    if isinstance(old, dict):
        return old | {"another": 1}
    if isinstance(old, list):
        return [*old, 7]
    if isinstance(old, str):
        return f"{old}/new"
    return 3 if old is None else old + 2


def test_every_key_has_a_class():
    for key, cls, field in KEYS:
        _, kind = split_documentation(field_documentation(cls)[field])
        assert kind is not None, f"the docstring of {key} does not say whether it may change on resume"
    assert len(KEYS) > 130
    assert {said_class(*key) for key in KEYS} == set(ResumeClass)


@pytest.fixture
def saved(tmp_path):
    """The parts of a checkpoint of `BASE` that are compared."""
    config = config_from_dict(BASE)
    (tmp_path / "model.json").write_text(json.dumps({"model": to_dict(config.student), "tokenizer": "t"}))
    common = {"settings": settings(config, config.student), "manifest": PRINTS, "optimizer": {}}
    return Resumable(tmp_path, 4, types.SimpleNamespace(common=common))


def resumed(saved: Resumable, values: dict, prints: dict = PRINTS) -> list:
    """`check_same_run` for a configuration that is not validated: combinations of values need not make sense
    here."""
    config = types.SimpleNamespace(checkpoint=types.SimpleNamespace(**values["checkpoint"]))
    current = json.dumps(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_mopd.run.resumable.settings", lambda config, student: current)
        return check_same_run(saved, config, config_from_dict(BASE).student, prints)


@pytest.mark.parametrize("key, cls, field", KEYS, ids=[key for key, _, _ in KEYS])
def test_a_changed_key_does_what_its_class_says(saved, key, cls, field):
    config = config_from_dict(BASE)
    values, old, new = with_other_value(json.loads(settings(config, config.student)), key)
    kind = said_class(key, cls, field)
    if kind is ResumeClass.MUST_NOT_CHANGE:
        with pytest.raises(ConfigError) as refused:
            resumed(saved, values)
        message = str(refused.value)
        assert message.startswith(f"{key}: ") and str(saved.path) in message and "\n" not in message
        for value in (old, new):
            assert (repr(value) if value is not None else "not set") in message
        return
    if key == "teachers[math].name":  # a teacher is identified by its name
        prints = PRINTS | {"teachers": {"algebra": {"weights": "m"}}}
        with pytest.raises(ConfigError, match="teachers: not those .* algebra \\(new\\), math \\(removed\\)"):
            resumed(saved, values, prints)
        return
    (change,) = resumed(saved, values)
    assert (change.key, change.old, change.new, change.kind) == (key, old, new, kind)
    if kind is ResumeClass.SAME_CONTENT:
        field = {"student.load": "student", "data.prompts[0].path": "prompts", "data.tokenizer": "tokenizer"}
        part = field.get(key, "teachers")
        other = {"prompts": ["q"], "teachers": {"math": {"weights": "n"}}}.get(part, "other")
        with pytest.raises(ConfigError, match=key.split("[")[0].replace(".", r"\.")) as refused:
            resumed(saved, values, PRINTS | {part: other})
        if part in ("student", "prompts"):
            assert repr(old) in str(refused.value) and repr(new) in str(refused.value)


def test_content_that_changed_in_place_is_refused(saved):
    values = to_dict(config_from_dict(BASE))
    for part, other, message in (
        ("student", "other", "student.load: weights differ from those that"),
        ("prompts", ["q"], r"data.prompts\[0\]: prompts differ from those that"),
        ("tokenizer", "other", "data.tokenizer: not the tokenizer"),
        ("teachers", {"math": {"weights": "n"}}, r"math \(weights\).*--allow-teacher-change"),
    ):
        with pytest.raises(ConfigError, match=message):
            resumed(saved, values, PRINTS | {part: other})


def test_other_teachers_and_their_routing_when_they_are_allowed(saved):
    values = to_dict(config_from_dict(BASE))
    values["checkpoint"]["allow_teacher_change"] = True
    values["teachers"].append({"name": "code", "load": "new"})
    values["routing"] = {"default": "math", "code": "code"}
    prints = PRINTS | {"teachers": {"math": {"weights": "n"}, "code": {"weights": "c"}}}
    assert {change.key for change in resumed(saved, values, prints)} == {
        "routing",
        "checkpoint.allow_teacher_change",
    }


def test_more_sources_of_prompts_are_refused_and_more_to_evaluate_on_are_not(saved):
    values = to_dict(config_from_dict(BASE))
    values["data"]["eval"].append({"path": "another"})
    assert [change.key for change in resumed(saved, values)] == ["data.eval (entries)"]
    values["data"]["prompts"].append({"path": "another"})
    with pytest.raises(ConfigError, match=r"data.prompts \(entries\): must not change .*\(1 in .* now 2\)"):
        resumed(saved, values)


def test_all_forbidden_changes_are_named_and_long_values_shortened(saved):
    values = to_dict(config_from_dict(BASE))
    values |= {"seed": 99, "params_dtype": "bfloat16"}
    values["objective"]["per_domain"] = {"x" * 500: {}}
    with pytest.raises(ConfigError) as refused:
        resumed(saved, values)
    assert str(refused.value).endswith("(also changed: params_dtype, objective.per_domain)")
    values |= {"seed": 1234, "params_dtype": "float32"}
    with pytest.raises(ConfigError) as refused:
        resumed(saved, values)
    assert len(str(refused.value)) < 300 + len(str(saved.path))


def test_a_checkpoint_of_an_earlier_release_is_compared_as_far_as_it_goes(saved):
    del saved.description.common["settings"]
    config = config_from_dict(BASE | {"seed": 5})
    assert check_same_run(saved, config, config.student, PRINTS) == []
    with pytest.raises(ConfigError, match="student.num_layers: the architecture must not change"):
        other = config_from_dict(BASE | {"student": BASE["student"] | {"num_layers": 6}}).student
        check_same_run(saved, config, other, PRINTS)


@pytest.mark.parametrize("text", ["{", "[]", '{"student": 3}', '{"data": {"prompts": [3]}}'])
def test_settings_that_are_not_readable(saved, text):
    saved.description.common["settings"] = text
    config = config_from_dict(BASE)
    with pytest.raises(ConfigError, match="run_dir: the settings that .* was saved with are not readable"):
        check_same_run(saved, config, config.student, PRINTS)


def test_a_key_that_the_saved_configuration_lacks_had_its_default():
    config = to_dict(config_from_dict(BASE))
    older = copy.deepcopy(config)
    del older["rollout"]["top_k"], older["guard"], older["data"]["prompts"][0]["weight"]
    assert changes(older, config) == []
    config["rollout"]["top_k"] = 5
    ((key, old, new),) = [(change.key, change.old, change.new) for change in changes(older, config)]
    assert (key, old, new) == ("rollout.top_k", 0, 5)


def test_fields_that_say_how_the_model_is_computed_are_megatron_cores():
    assert {field.name for field in dataclasses.fields(TransformerConfig)} >= EXECUTION_FIELDS


def test_a_run_that_is_finished_or_cannot_go_on(saved):
    saved.check_continues(config_from_dict(BASE))
    for iterations in (4, 2):
        with pytest.raises(FinishedRun, match=f"4 iterations and schedule.train_iters is {iterations}"):
            schedule = BASE["schedule"] | {"train_iters": iterations}
            saved.check_continues(config_from_dict(BASE | {"schedule": schedule, "checkpoint": {}}))
    with pytest.raises(
        ConfigError, match="schedule.steps_per_rollout: .* in the middle of a rollout batch of 3"
    ):
        schedule = BASE["schedule"] | {"train_iters": 9, "steps_per_rollout": 3}
        saved.check_continues(config_from_dict(BASE | {"schedule": schedule, "checkpoint": {}}))
    del saved.description.common["optimizer"]
    with pytest.raises(ConfigError, match="no optimizer state"):
        saved.check_continues(config_from_dict(BASE))


def test_what_is_said_is_one_line_however_much_changed(capsys, saved):
    values = to_dict(config_from_dict(BASE))
    for number, key in enumerate(values["log"]):
        values["log"][key] = number + 70
    values["optimizer"] |= {"lr": 1e-2, "min_lr": 1e-3}
    say_changes(resumed(saved, values), {}, {})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "resume: changed since: optimizer.lr 1e-05 -> 0.01, optimizer.min_lr 0.0 -> 0.001, "
    )
    assert line.endswith(f" and {len(values['log']) - 6} more")  # eight are named, two of the optimizer


def test_positions_go_on_where_they_were():
    """Batches of 4 prompts, then 8, then two of 3 with two steps each, then 4: every prompt in order."""
    position, drawn = DataPosition(1, 4), []
    for first, last, steps, prompts in ((0, 4, 1, 4), (4, 6, 1, 8), (6, 10, 2, 3), (10, 12, 1, 4)):
        position = DataPosition.from_state(position.resized(first, steps, prompts).state_dict())
        for iteration in range(first, last, steps):
            before = position.prompts_before(position.batch(iteration))
            drawn += range(before, before + position.prompts_per_rollout)
    assert drawn == list(range(4 * 4 + 2 * 8 + 2 * 3 + 2 * 4))
    assert position.batch(12) == 4 + 2 + 2 + 2, "rollout batches are not numbered consecutively"
    assert position.resized(12, 1, 4) is position
