"""Whole runs with teachers: resuming with different ones, and user errors reported before training."""

import pytest

from tests import _runs


def checkpoint(directory, name, **schedule):
    """Train a model on the answers for one step and return its checkpoints."""
    configuration = _runs.values(
        directory, run_dir=str(directory / name), schedule=dict(train_iters=1) | schedule, seed=len(name)
    )
    outcome = _runs.run_main(_runs.write_config(directory / f"{name}.yaml", configuration))
    assert outcome.statuses == [0], outcome.printed
    return str(directory / name / "checkpoints")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    _runs.write_inputs(directory)
    return directory, {name: checkpoint(directory, name) for name in ("student", "expert-a", "other")}


def distil(inputs, run, teachers, arguments=(), **sections):
    directory, checkpoints = inputs
    sections = {
        "objective": {"kind": "full_vocab_kl"},
        "student": {"load": checkpoints["student"]},
        "routing": {"default": {"expert": 0.8, "self": 0.2}},
        "teacher_storage": {"mode": "mmap"},
        "schedule": {"train_iters": 1},
    } | sections
    configuration = _runs.values(directory, run_dir=str(directory / run), **sections)
    configuration["student"] = sections["student"]
    configuration["teachers"] = [{"name": "expert", "load": teachers}, {"name": "self"}]
    path = directory / f"{run}.yaml"
    return _runs.run_main([*_runs.write_config(path, configuration), *arguments])


def test_a_resume_with_other_teachers_is_refused_unless_allowed(inputs):
    _, checkpoints = inputs
    first = distil(inputs, "run", checkpoints["expert-a"])
    assert first.statuses == [0], first.printed
    assert "ALARM: teacher" not in first.printed
    longer = {"schedule": {"train_iters": 2}}
    refused = distil(inputs, "run", checkpoints["other"], **longer)
    assert refused.statuses == [2]
    assert "expert (weights)" in refused.printed and "--allow-teacher-change" in refused.printed
    allowed = distil(inputs, "run", checkpoints["other"], ["--allow-teacher-change"], **longer)
    assert allowed.statuses == [0], allowed.printed
    assert "teachers changed since" in allowed.printed and "expert (weights)" in allowed.printed


def test_a_teacher_with_the_students_weights_raises_the_alarm(inputs):
    _, checkpoints = inputs
    outcome = distil(
        inputs, "same", checkpoints["student"], teacher_storage={}, routing={"default": "expert"}
    )
    assert outcome.statuses == [0], outcome.printed
    assert "ALARM: teacher 'expert' equals the student" in outcome.printed  # from the files
    assert "ALARM: teacher expert equals the student on domain" in outcome.printed  # from the first step
    assert "teachers.self: no domain of the prompts is routed to it, so it is not loaded" in outcome.printed


def test_a_teacher_that_does_not_fit_the_layout_is_named(inputs):
    directory, _ = inputs
    three = _runs.describe_checkpoint(
        directory / "three", directory / "tokenizer.model", num_attention_heads=3
    )
    configuration = _runs.values(
        directory,
        run_dir=str(directory / "layout"),
        objective={"kind": "full_vocab_kl"},
        routing={"default": "expert"},
        parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True},
    )
    configuration["teachers"] = [{"name": "expert", "load": str(three)}]
    outcome = _runs.run_main(_runs.write_config(directory / "layout.yaml", configuration), 2)
    assert outcome.statuses == [2, 2]
    assert "teachers.expert does not fit the layout" in outcome.printed
