"""Weights & Biases, replaced by a module that records the calls."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest

from megatron_mopd.config import ConfigError, config_from_dict
from megatron_mopd.observe import weights_and_biases as module
from megatron_mopd.observe.run_log import RunLog


class _Run:
    def __init__(self, arguments):
        self.arguments, self.logged, self.finished = arguments, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def runs(monkeypatch):
    """Every run that was started."""
    begun = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    fake.init = lambda **arguments: begun.append(_Run(arguments)) or begun[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return begun


def config(directory, **log):
    values = {"run_dir": str(directory / "math"), "schedule": {"train_iters": 2}}
    return config_from_dict(values | {"log": {"tensorboard": False} | log})


def test_metrics_are_sent_by_rank_0(tmp_path, runs, monkeypatch, capsys):
    settings = config(tmp_path, wandb_project="mopd")
    module.check_tracking(settings.log)
    for _ in range(2):
        log = RunLog(settings, 0)
        log.step(1, {"kl": {"gcd": 0.5}, "loss": float("nan"), "note": "text"})
        log.close()
    assert [run.logged for run in runs] == [[(1, {"kl/gcd": 0.5})]] * 2 and all(r.finished for r in runs)
    first, second = (run.arguments for run in runs)
    assert first["project"] == "mopd" and first["name"] == "math" and first["resume"] == "allow"
    assert first["id"] == second["id"], "a resumed run must keep its id"
    assert first["config"]["schedule"]["train_iters"] == 2
    monkeypatch.setenv("RANK", "1")
    RunLog(settings, 0).close()
    assert len(runs) == 2


def test_nothing_is_sent_unless_asked_for(tmp_path, runs):
    RunLog(config(tmp_path), 0).close()
    assert runs == []


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    module.check_tracking(config(tmp_path).log)
    with pytest.raises(ConfigError, match="pip install wandb"):
        module.check_tracking(config(tmp_path, wandb_project="mopd").log)
