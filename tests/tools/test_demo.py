"""The demo's stages: valid configurations, skipping finished stages, and the reported numbers."""

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_mopd.config import config_from_dict

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo_script():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_configs(module, demo):
    return [demo.base(), *map(demo.expert, module.EXPERTS), demo.average(), demo.mopd()]


def test_every_stage_has_a_valid_configuration(demo_script, tmp_path):
    demo = demo_script.Demo(tmp_path, seed=1, processes=2)
    assert len(demo_script.EXPERTS) >= 12 and demo_script.HELD_OUT >= 200
    for config in all_configs(demo_script, demo):
        config_from_dict(config)
    mopd = demo.mopd()
    assert {t["name"] for t in mopd["teachers"]} == {*demo_script.EXPERTS, "self"}
    assert mopd["objective"]["kind"] == "full_vocab_kl"


def test_no_stage_of_any_seed_draws_the_held_out_prompts_of_its_evaluation(demo_script, tmp_path):
    for seed in (1, 2):
        demo = demo_script.Demo(tmp_path, seed=seed, processes=2)
        held_out = {source["seed"] for source in demo.mopd()["data"]["eval"]}
        for config in all_configs(demo_script, demo):
            assert {source["seed"] for source in config["data"]["eval"]} == held_out
            assert not held_out & {source["seed"] for source in config["data"]["prompts"]}


def write_accuracies(run_dir, iteration, values):
    run_dir.mkdir(parents=True, exist_ok=True)
    line = {"iteration": iteration, "accuracy": 0.5} | {f"accuracy/{t}": v for t, v in values.items()}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_a_finished_stage_is_skipped_and_another_configuration_runs_it_again(demo_script, tmp_path):
    demo = demo_script.Demo(tmp_path, seed=1, processes=2)
    stages = demo_script.Stages(tmp_path)
    config = demo.base()
    path = stages.prepare(config)
    assert path is not None, "nothing has run yet"
    iterations = config["schedule"]["train_iters"]
    write_accuracies(tmp_path / "base", iterations - 1, {})
    assert stages.prepare(config) == path, "half a run is not a finished stage"
    write_accuracies(tmp_path / "base", iterations, {})
    assert stages.prepare(config) is None
    config["schedule"]["train_iters"] += 1
    (tmp_path / "base/checkpoints").mkdir()
    assert stages.prepare(config) == path
    assert not (tmp_path / "base/checkpoints").exists(), "another configuration must not resume this one"


def test_headroom_in_the_report(demo_script, tmp_path, capsys):
    demo = demo_script.Demo(tmp_path, seed=1, processes=2)
    tasks = list(demo_script.TASKS)
    write_accuracies(tmp_path / "base", 1, dict.fromkeys(tasks, 0.4))
    write_accuracies(tmp_path / "average", 0, dict.fromkeys(tasks, 0.45))
    for expert in demo_script.EXPERTS:
        away = dict.fromkeys(tasks, 0.2)
        write_accuracies(tmp_path / "experts" / expert, 1, away | {expert: 0.9})
    write_accuracies(tmp_path / "mopd", 1, dict.fromkeys(tasks, 0.8))
    headroom = demo_script.report(demo)
    assert headroom["mean"] == pytest.approx(0.8)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["headroom_recovered"] == pytest.approx(headroom)
    assert (tmp_path / "seesaw.png").stat().st_size > 10_000
    assert "MOPD student" in capsys.readouterr().out
