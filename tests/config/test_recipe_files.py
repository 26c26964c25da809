"""Every file under launch/recipes is a configuration, and the tiny ones differ in nothing but the recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mopd.config import ConfigError, load_config, to_dict
from megatron_mopd.config.recipes import RECIPES

FOLDER = Path(__file__).parents[2] / "launch/recipes"


@pytest.mark.parametrize("name", RECIPES)
def test_real_scale(name):
    config = load_config(FOLDER / f"{name}.yaml")
    assert config.recipe == name and config.student.load
    domains = {source.domain for source in config.data.prompts}
    assert domains == set(config.routing)
    published = RECIPES[name]
    for section in ("objective", "optimizer", "schedule"):
        for key, value in published[section].items():
            assert getattr(getattr(config, section), key) == value, f"{section}.{key} is the recipe's"


def test_the_larger_student_is_an_override():
    config = load_config(FOLDER / "deepseek_v4.yaml", ["include=students/qwen3_235b_a22b.yaml"])
    assert config.parallel.expert_model_parallel_size == 32
    assert config.parallel.sequence_parallel and config.student.load.endswith("235b-a22b")


def test_tiny_recipes_have_equal_steps_and_samples():
    configs = {name: to_dict(load_config(FOLDER / f"{name}_tiny.yaml")) for name in RECIPES}
    for config in configs.values():
        for key in ("recipe", "run_dir", "objective"):
            config.pop(key)
        config["rollout"].pop("samples_per_prompt")  # the group size is part of a recipe
    first = next(iter(configs.values()))
    assert all(config == first for config in configs.values())


def test_iterated():
    expert = load_config(FOLDER / "iterated_expert.yaml", ["run_dir=x/round_1/experts/a"])
    assert expert.objective.kind == "sft" and expert.checkpoint.resume
    student = load_config(FOLDER / "iterated_mopd.yaml", ["run_dir=x/round_1/mopd"])
    assert student.teachers[0].load.startswith("x/round_1/mopd/../experts/")
    assert student.checkpoint.resume and student.recipe == "deepseek_v4"


def test_the_stages_of_iterated_find_each_other(tmp_path):
    """The script with a stand-in for training, which wants every checkpoint that its configuration names and
    leaves one itself."""
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"""#!{sys.executable}
import sys
from pathlib import Path
from megatron_mopd.config import load_config
config = load_config(sys.argv[4], sys.argv[5:])
for path in [config.student.load, *(teacher.load for teacher in config.teachers)]:
    assert Path(path).is_dir(), path
assert {{prompt.task for prompt in config.data.prompts}} >= {{t.name for t in config.teachers}}
(Path(config.run_dir) / "checkpoints").mkdir(parents=True, exist_ok=True)
print("trained", config.run_dir)
"""
    )
    stand_in.chmod(0o755)
    (tmp_path / "base").mkdir()
    environment = os.environ | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    script = FOLDER.parent / "iterated_mopd.sh"
    done = subprocess.run(
        ["bash", script, tmp_path / "base", tmp_path / "runs"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[1],
    )
    assert done.returncode == 0, done.stderr
    trained = [line for line in done.stdout.splitlines() if line.startswith("trained")]
    assert len(trained) == 6 and trained[-1].endswith("round_2/mopd")
    assert done.stdout.strip().endswith("round_2/mopd/checkpoints")


def test_a_file_that_includes_itself(tmp_path):
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    with pytest.raises(ConfigError, match="includes itself"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="config file not found"):
        load_config(tmp_path / "a.yaml", ["include=c.yaml"])
