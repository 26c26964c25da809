"""A run's files do not grow without bound, and nothing that a resume or a reader needs is lost."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import time
import types

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from megatron_mopd.config import config_from_dict
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.observe import journal as module
from megatron_mopd.observe import metrics as metrics_module
from megatron_mopd.observe import run_log
from megatron_mopd.observe.journal import METRICS_FILE, SAMPLES_FILE, Journal, parts_of, read_journal
from megatron_mopd.observe.metrics import MetricsWriter, read_metrics
from megatron_mopd.observe.page import write_page
from megatron_mopd.observe.pictures import draw_report
from megatron_mopd.observe.progress import StepLine
from megatron_mopd.observe.run_log import RunLog
from megatron_mopd.run import rollout_logs as rollout_log
from megatron_mopd.training import skipped_steps as nonfinite


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Set bounds small enough for a test to reach."""
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    monkeypatch.setattr(metrics_module, "FULL_STEPS", 8)
    monkeypatch.setattr(nonfinite, "MOST_EVIDENCE", 6)
    monkeypatch.setattr(nonfinite, "MOST_EVIDENCE_BYTES", 10_000)
    monkeypatch.setattr(rollout_log, "MOST_LOGS", 6)
    monkeypatch.setattr(rollout_log, "MOST_LOG_BYTES", 10_000)


def step(iteration):
    """Metrics of a step: some logged every step, one irregularly, one every 10 steps."""
    metrics = {"loss": 1 / iteration, "kl/gcd": 0.25 * iteration}
    if iteration % 7 in (1, 2):
        metrics["kl/rare"] = float(iteration)
    if iteration % 10 == 0:
        metrics |= {"accuracy/gcd": iteration / 1000, "nothing": float("nan")}
    return metrics


def write(directory, first, last, resumed=None, say=None, total=None):
    writer = MetricsWriter(directory, resumed_iteration=resumed, say=say, last=total)
    for iteration in range(first, last + 1):
        writer.log(iteration, step(iteration))
    return writer


def points(directory):
    """The points that TensorBoard shows: tag -> [(step, value)]."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, repr(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_BYTES", 1000)
        patch.setattr(metrics_module, "FULL_STEPS", 8)
        directory = tmp_path_factory.mktemp("growth") / "run"
        write(directory, 1, 300, total=300).close()
        return read_metrics(directory), points(directory)


def test_the_file_stays_small_and_every_step_is_there(tmp_path):
    said = []
    writer = MetricsWriter(tmp_path, tensorboard=False, say=said.append)
    for iteration in range(1, 301):
        writer.log(iteration, step(iteration))
        assert (tmp_path / METRICS_FILE).stat().st_size < 2 * 1000 + 200
        recent = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
        assert [line["iteration"] for line in recent] == list(
            range(iteration - len(recent) + 1, iteration + 1)
        )
        assert len(recent) >= min(iteration, 10), "recent steps are missing"
    writer.close()
    parts = parts_of(tmp_path / METRICS_FILE)
    assert len(parts) > 10 and parts[0].path.name == f"metrics-00000001-{parts[0].last:08d}.jsonl.gz"
    assert all(b.first == a.last + 1 for a, b in zip(parts, parts[1:]))
    lines = read_metrics(tmp_path)
    assert [line["iteration"] for line in lines] == list(range(1, 301))
    assert lines[6] == {"iteration": 7, "loss": 1 / 7, "kl/gcd": 1.75} and lines[9]["nothing"] is None
    assert [text for text in said if "metrics" in text] == [said[0]] and "none is lost" in said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([METRICS_FILE, *(p.path.name for p in parts)])
    MetricsWriter(tmp_path, tensorboard=False).close()
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE] and read_metrics(tmp_path) == []


@pytest.fixture
def seconds(monkeypatch):
    """Put starts seconds apart, because TensorBoard orders event files by their start time."""
    clock = itertools.count(int(time.time()))
    values = vars(time) | {"time": lambda: next(clock)}
    monkeypatch.setattr(event_file_writer, "time", types.SimpleNamespace(**values))


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_resumes_with_the_uninterrupted_one_s_metrics(tmp_path, uninterrupted, seconds, seed):
    """Killed at random steps, resumed from older checkpoints: the same lines, and the same points."""
    rng, done, resumed = random.Random(seed), 0, None
    while done < 300:
        end = min(300, done + rng.randint(1, 130))
        writer = write(tmp_path, done + 1, end, resumed, total=300)
        if end == 300:
            writer.close()
            break
        writer._tensorboard.flush()  # before it is killed
        with open(tmp_path / METRICS_FILE, "a") as file:
            file.write('{"iteration": 301, "lo' * rng.randrange(2))
        done = rng.randint(max(0, end - 60), end)
        resumed = done or None
    lines, shown = uninterrupted
    assert read_metrics(tmp_path) == lines
    assert points(tmp_path) == shown


@pytest.mark.parametrize("after", range(4))
def test_killed_while_lines_are_moved(tmp_path, monkeypatch, after):
    """Killed at any file replacement: readers see each step once, and so does the next start."""
    writer = Journal(tmp_path / METRICS_FILE)
    for iteration in range(1, 101):
        writer.write(iteration, step(iteration) | {"nothing": None})
    replace, left = os.replace, [after]

    def die(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*arguments)

    monkeypatch.setattr(module.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        for iteration in range(101, 300):
            writer.write(iteration, step(iteration) | {"nothing": None})
    monkeypatch.setattr(module.os, "replace", replace)
    last = read_journal(tmp_path / METRICS_FILE)[-1]["iteration"]
    assert [line["iteration"] for line in read_journal(tmp_path / METRICS_FILE)] == list(range(1, last + 1))
    left[0] = 0
    monkeypatch.setattr(module.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):  # the next start dies while it removes newer steps
        Journal(tmp_path / METRICS_FILE, 60)
    monkeypatch.setattr(module.os, "replace", replace)
    Journal(tmp_path / METRICS_FILE, 60)
    assert [line["iteration"] for line in read_journal(tmp_path / METRICS_FILE)] == list(range(1, 61))
    assert not list(tmp_path.glob("*.tmp"))


def test_moved_while_it_is_read(tmp_path):
    """A report on an active run misses nothing and counts nothing twice."""
    writer = Journal(tmp_path / METRICS_FILE)
    for iteration in range(1, 61):
        writer.write(iteration, step(iteration) | {"nothing": None})
    reading = module._lines(tmp_path / METRICS_FILE)
    seen = [next(reading)[1]["iteration"]]
    for iteration in range(61, 121):
        writer.write(iteration, step(iteration) | {"nothing": None})
    seen += [values["iteration"] for _, values in reading]
    assert seen[:60] == list(range(1, 61)) and seen == list(range(1, len(seen) + 1))


def test_a_full_disk_keeps_the_file(tmp_path, monkeypatch):
    said, make = [], module._replace

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_replace", full)
    writer = Journal(tmp_path / METRICS_FILE, say=said.append)
    for iteration in range(1, 101):
        writer.write(iteration, step(iteration) | {"nothing": None})
    assert 1 <= len(said) < 10 and "No space left" in said[0]
    monkeypatch.setattr(module, "_replace", make)
    for iteration in range(101, 150):
        writer.write(iteration, step(iteration) | {"nothing": None})
    assert len(parts_of(tmp_path / METRICS_FILE)) > 3 and (tmp_path / METRICS_FILE).stat().st_size < 2200
    assert [line["iteration"] for line in read_journal(tmp_path / METRICS_FILE)] == list(range(1, 150))


def test_a_damaged_part_is_read_as_far_as_it_goes(tmp_path):
    write(tmp_path, 1, 100).close()
    part = parts_of(tmp_path / METRICS_FILE)[1]
    part.path.write_bytes(part.path.read_bytes()[:-30])
    found = [line["iteration"] for line in read_metrics(tmp_path)]
    assert found[0] == 1 and found[-1] == 100 and len(found) >= 100 - (part.last - part.first + 1)
    (tmp_path / "metrics-1-x.jsonl.gz").write_bytes(b"of somebody else")
    assert len(read_metrics(tmp_path)) == len(found)


def test_the_file_of_an_older_version_is_taken_over(tmp_path):
    lines = [json.dumps({"iteration": i, "loss": 0.5}) for i in range(1, 501)]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines) + "\n")
    writer = Journal(tmp_path / METRICS_FILE, 450)
    writer.write(451, {"loss": 0.25})
    assert (tmp_path / METRICS_FILE).stat().st_size < 2000 and len(parts_of(tmp_path / METRICS_FILE)) > 10
    found = read_metrics(tmp_path)
    assert [line["iteration"] for line in found] == list(range(1, 452)) and found[-1]["loss"] == 0.25


def test_tensorboard_gets_ever_fewer_points(uninterrupted):
    _, shown = uninterrupted
    steps = [number for number, _ in shown["loss"]]
    assert steps[:16] == list(range(1, 17)) and steps[-1] == 300
    for begin in (16, 32, 64, 128):
        assert 7 <= sum(begin <= number < 2 * begin for number in steps) <= 9
    rare = [number for number, _ in shown["kl/rare"]]
    assert rare[:4] == [1, 2, 8, 9] and len(rare) <= len(steps), "points of a rare metric are missing"
    assert [n for n, _ in shown["accuracy/gcd"]][:12] == list(range(10, 130, 10)) and "nothing" in shown


def test_it_is_said_once(tmp_path):
    said = []
    write(tmp_path, 1, 100, say=said.append).close()
    assert (
        sum("TensorBoard" in text for text in said) == 1 and sum("none is lost" in text for text in said) == 1
    )


def test_samples_and_alarms(tmp_path, monkeypatch, capsys):
    """The first and the newest samples are kept; all alarms are, compressed, and the page shows some."""
    monkeypatch.setattr(run_log, "_MOST_SAMPLE_PARTS", 3)
    config = config_from_dict({"run_dir": str(tmp_path), "log": {"tensorboard": False}})
    log = RunLog(config, 0)
    sample = {"domain": "gcd", "tokens": ["a"] * 20, "kl": [0.1] * 20, "prompt": "p"}
    for iteration in range(1, 101):
        log.step(iteration, {"loss": 1.0})
        log.samples(iteration, [sample, sample, sample])
    for iteration in range(1, 401):
        log.alarm(iteration, f"alarm {iteration}")
    log.close()
    kept = [line["iteration"] for line in read_journal(tmp_path / SAMPLES_FILE)]
    assert kept[:3] == [1, 1, 1] and kept[-3:] == [100] * 3 and 20 < len(kept) < 60
    assert all(kept.count(iteration) == 3 for iteration in kept), "an iteration's samples stay together"
    assert len(parts_of(tmp_path / SAMPLES_FILE)) == 3
    assert "samples-" in capsys.readouterr().out
    text = write_page(tmp_path).read_text()
    assert "alarm 1<" in text and "alarm 400<" in text and "alarm 150<" not in text and "200 more" in text
    assert "Iteration 100" in text and "Iteration 1, for comparison" in text


def test_readers_of_a_long_run(tmp_path, monkeypatch):
    """Readers get every n-th step, the last one, and every evaluation."""
    write(tmp_path, 1, 299).close()
    lines = read_metrics(tmp_path, most=50)
    found = [line["iteration"] for line in lines]
    assert len(found) < 100 and found[0] == 1 and found[-1] == 299
    assert set(range(10, 300, 10)) <= set(found)
    from megatron_mopd.observe import pictures, recorded_run

    for reader in (pictures, recorded_run):
        monkeypatch.setattr(reader, "MOST_LINES", 50)
    draw_report(tmp_path)
    record = recorded_run.read_run(tmp_path)
    assert len(record.metrics) == len(found) and any("every n-th" in text for text in record.missing)


def test_the_step_line_s_memory():
    line = StepLine(10)
    for iteration in range(5000):
        line.record({"kl/gcd": 1.0 + iteration})
    course = line._kl["gcd"]
    assert 256 <= len(course.means) <= 512 and course.means[0] < 20 and course.means[-1] > 4900
    assert "gcd" in line.render(1, {"kl/gcd": 3.0, "kl/new": 2.0}).plain


def test_evidence(tmp_path, capsys):
    """Evidence of the first and the last skipped steps is kept, within a limit in bytes too."""
    groups = types.SimpleNamespace(rank=0)
    prompt = Prompt("p", (1, 2), "gcd", None, "none", None, 0, "here")
    batch = [Trajectory(prompt, (3,) * 20, 0, (-0.5,) * 20)]
    chunk = torch.nn.Linear(1, 1)
    chunk.weight.main_grad = torch.full((1, 1), np.nan)
    for iteration in range(1, 41):
        path = nonfinite.save_evidence(tmp_path, iteration, [chunk], batch, {"loss": 1.0}, groups)
        assert sorted(file.name for file in path.iterdir()) == ["batch.json", "rank_0.json"]
    kept = [int(path.name[5:]) for path in sorted(tmp_path.iterdir())]
    assert kept == [1, 2, 3, 38, 39, 40]
    assert capsys.readouterr().out.count("is removed") == 34
    (tmp_path / "iter_0000041").mkdir()
    (tmp_path / "iter_0000041" / "batch.json").write_bytes(b"x" * 20_000)
    nonfinite.limit_evidence(tmp_path)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [1, 41], "the first and the newest"


@pytest.mark.parametrize("size, expected", [(10, [0, 1, 37, 38, 39]), (4000, [0, 1, 38, 39])])
def test_rollout_logs_between_checkpoints(tmp_path, capsys, size, expected):
    """Without a checkpoint the oldest are removed, except those sampled from weights before the current ones,
    which only a checkpoint has."""

    def sampled(number):
        directory = tmp_path / "rollouts" / f"batch_{number:09d}"
        directory.mkdir(parents=True)
        (directory / "00000-1.log").write_bytes(b"x" * size)

    for number in range(40):
        rollout_log.limit_rollout_logs(str(tmp_path), number, ahead=1)
        sampled(number)
    rollout_log.limit_rollout_logs(str(tmp_path), 40, ahead=1)
    kept = [int(path.name.removeprefix("batch_")) for path in sorted((tmp_path / "rollouts").iterdir())]
    assert kept[-2:] == [38, 39] and kept[:2] == [0, 1] and len(kept) <= 6, kept
    assert len(kept) >= len(expected) and sum(size for _ in kept) <= max(10_000, size * 4)
    assert capsys.readouterr().out.count("are removed") == 1
    rollout_log.remove_rollout_logs(str(tmp_path), 39, False)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["batch_000000039"]


def test_parts_are_gzip(tmp_path):
    write(tmp_path, 1, 100).close()
    first = parts_of(tmp_path / METRICS_FILE)[0]
    with gzip.open(first.path, "rt") as file:
        assert json.loads(file.readline())["iteration"] == 1
