"""Every file under launch/recipes is a valid configuration, and the tiny ones differ only in the recipe."""

from __future__ import annotations

import os
import subprocess
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
            assert getattr(getattr(config, section), key) == value, f"{section}.{key} is not the recipe's"


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


STAND_IN = """#!/usr/bin/env bash
for argument in "$@"; do
  case $argument in run_dir=*) run_dir=${argument#*=} ;; student.load=*) student=${argument#*=} ;; esac
done
[ -d "$student" ] || { echo "no $student" >&2; exit 3; }
if [[ $run_dir == */mopd ]]; then
  for task in leg_counting palindrome_generation; do
    [ -d "$run_dir/../experts/$task/checkpoints" ] || { echo "no expert for $task" >&2; exit 4; }
  done
fi
mkdir -p "$run_dir/checkpoints"
echo "trained $run_dir"
"""


def test_the_stages_of_iterated_find_each_other(tmp_path):
    """Run the script with a stand-in for training that requires the checkpoints its stage needs, and writes
    one itself."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(STAND_IN)
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / "base").mkdir()
    done = subprocess.run(
        ["bash", FOLDER.parent / "iterated_mopd.sh", tmp_path / "base", tmp_path / "runs"],
        env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
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
