"""Metrics: one valid JSON object per step, no duplicates after a resume, nothing from other ranks."""

import json
import math

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mopd.observe.metrics import METRICS_FILE, MetricsWriter, is_main_rank, read_metrics


def strict(text):
    """Parse JSON strictly, as other programs do: NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_line_a_step_flushed_at_once(tmp_path):
    writer = MetricsWriter(tmp_path / "run", tensorboard=False)
    writer.log(1, {"loss": torch.tensor(0.5), "kl": {"gcd": np.float32(0.25)}, "note": "warm-up", "count": 3})
    text = (tmp_path / "run" / METRICS_FILE).read_text()
    assert strict(text) == {"iteration": 1, "loss": 0.5, "kl/gcd": 0.25, "note": "warm-up", "count": 3}
    writer.close()
    writer.close()


def test_values_that_are_not_finite(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.log(1, {"loss": math.nan, "grad_norm": torch.tensor(math.inf), "lr": 0.1})
    writer.close()
    line = strict((tmp_path / METRICS_FILE).read_text())
    assert line["loss"] is None and line["grad_norm"] is None and line["lr"] == 0.1
    assert line["nonfinite"] == {"loss": "nan", "grad_norm": "inf"}


@pytest.mark.parametrize("tail", ["", '{"iteration": 5, "lo', '{"iteration": 5}', "\x00\x00", "3\n[]\n"])
def test_resuming_removes_later_and_torn_lines(tmp_path, tail):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for iteration in range(1, 5):
        writer.log(iteration, {"loss": iteration})
    writer.close()
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write(tail)
    writer = MetricsWriter(tmp_path, tensorboard=False, resumed_iteration=2)
    writer.log(3, {"loss": 30})
    writer.close()
    lines = [strict(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [(line["iteration"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 30)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS_FILE]


def test_a_new_run_starts_afresh(tmp_path):
    for _ in range(2):
        writer = MetricsWriter(tmp_path, tensorboard=False)
        writer.log(0, {"loss": 1})
        writer.close()
    assert len(read_metrics(tmp_path)) == 1


def test_tensorboard_tags(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.log(1, {"loss": 0.5, "kl": {"gcd": 0.25}, "note": "text is for the JSON file only"})
    writer.log(2, {"loss": 0.4})
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["kl/gcd", "loss"]
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.4)]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not is_main_rank()
    writer = MetricsWriter(tmp_path / "run")
    writer.log(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "run").exists()
