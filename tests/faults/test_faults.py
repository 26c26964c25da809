"""A run that is killed, preempted, short of disk space or given bad values loses nothing and reports why."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import shutil
import signal
import time

import pytest

from megatron_mopd import train
from megatron_mopd.observe.metrics import read_metrics
from megatron_mopd.run.preemption import PREEMPTED_STATUS
from tests import _runs
from tests.faults import fuzz_configs, fuzz_inputs, harness
from tests.faults.harness import RANKS, Job, before, fingerprint

DONE = [0] * RANKS


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults")
    harness.write_inputs(directory)
    return directory


@pytest.fixture(scope="module")
def reference(directory):
    """The undisturbed run."""
    job = Job(harness.arguments(directory, "reference")).wait()
    assert job.statuses == DONE, job.printed
    metrics = _runs.comparable(directory / "reference")
    assert [line["iteration"] for line in metrics] == list(range(1, 7))
    assert metrics[-1]["loss"] != metrics[-3]["loss"] and metrics[-1]["kl/copy"] > 0, "nothing to compare"
    return directory / "reference"


def assert_equal(run_dir, reference):
    assert _runs.comparable(run_dir) == _runs.comparable(reference)
    assert fingerprint(run_dir) == fingerprint(reference), "weights or optimizer state differ"


def test_asked_to_stop(directory, reference):
    """One rank gets the signal in the middle of a rollout batch: all save at its end and exit with 75."""
    command = harness.arguments(
        directory, "stopped", checkpoint={"save_interval": 0, "save_optimizer": False}
    )
    job = Job(command, before("train_step", 3, 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))).wait()
    assert job.statuses == [PREEMPTED_STATUS] * RANKS, job.printed
    assert "saved iteration 4" in job.stdout[0] and not any(job.stderr)
    assert [path.name for path in (directory / "stopped" / "checkpoints").glob("iter_*")] == ["iter_0000004"]
    job = Job(harness.arguments(directory, "stopped")).wait()
    assert job.statuses == DONE, job.printed
    assert_equal(directory / "stopped", reference)


def test_a_second_start_and_ctrl_c(directory, reference):
    """A second start in the directory of an active run is refused; Ctrl-C then stops the run like SIGTERM."""
    at_step, refused = directory / "at step", directory / "refused"

    def wait_and_interrupt():
        at_step.write_text(str(os.getpid()))
        while not refused.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    command = harness.arguments(directory, "twice")
    job = Job(command, before("train_step", 3, 0, wait_and_interrupt))
    while not at_step.exists() and job.processes[0].is_alive():
        time.sleep(0.05)

    def files():  # all but the checkpoint, which may still be written
        return {path: path.read_bytes() for path in (directory / "twice").glob("*") if path.is_file()}

    before_it = files()
    second = Job(command).wait()
    assert second.statuses == [2] * RANKS, second.printed
    (error,) = [text for text in second.stderr if text]
    assert re.search(rf"twice is in use: process {at_step.read_text()} on host .*, started \d+ sec", error)
    assert error.count("\n") == 1
    assert files() == before_it and {"config.yaml", "run.lock"} <= {path.name for path in before_it}
    refused.touch()
    job.wait()
    assert job.statuses == [PREEMPTED_STATUS] * RANKS, job.printed
    assert "saved iteration 4" in job.stdout[0]
    assert job.stderr[0].strip().startswith("Ctrl-C: stopping after this step") and not job.stderr[1]
    assert "Traceback" not in job.printed
    assert Job(command).wait().statuses == DONE
    assert_equal(directory / "twice", reference)


def test_damaged_checkpoints(directory, reference):
    """A flipped bit and a truncated file are detected; the run reports it and resumes from the newest intact
    checkpoint."""
    run_dir = directory / "damaged"
    shutil.copytree(reference, run_dir)
    checkpoints = run_dir / "checkpoints"
    newest = max((checkpoints / "iter_0000006").glob("*.distcp"), key=lambda path: path.stat().st_size)
    harness.flip_bit(newest, newest.stat().st_size // 2)
    second = next((checkpoints / "iter_0000004").glob("*.distcp"))
    os.truncate(second, second.stat().st_size - 1)
    (checkpoints / ".iter_0000010.incomplete").mkdir()
    settings = {"keep_last": 1, "keep_every": 4, "save_interval": 2}
    job = Job(harness.arguments(directory, "damaged", checkpoint=settings)).wait()
    assert job.statuses == DONE, job.printed
    said = job.stdout[0]
    assert f"{newest.name} differs from its checksum" in said and f"{second.name} has" in said
    assert ".iter_0000010.incomplete" in said and "step 3/6" in said and "step 2/6" not in said
    assert_equal(run_dir, reference)
    # keep_last 1 keeps 6, keep_every 4 keeps 4, and 2 is deleted.
    kept = sorted(path.name for path in checkpoints.glob("iter_*"))
    assert kept == ["iter_0000004", "iter_0000006"]

    for name in kept:
        (checkpoints / name / "model.json").write_text("{}")
    job = Job(harness.arguments(directory, "damaged")).wait()
    assert job.statuses == [2] * RANKS, job.printed
    assert "model.json has 2 bytes" in job.printed and "iter_0000006" in job.stderr[0] + job.stderr[1]


def test_full_disk(directory, reference):
    """One rank cannot write its part of a checkpoint: the previous one stays, and the run resumes from it."""
    job = Job(
        harness.arguments(directory, "full", schedule={"eval_interval": 0}),
        before("save", 2, 0, harness.no_room(8192)),
    ).wait()
    assert job.statuses == [1] * RANKS, job.printed
    (error,) = [text for text in job.stderr if text]
    assert re.fullmatch(
        "error: iteration 4 could not be saved; the previous checkpoint is intact: "
        r"rank 0: \S+/checkpoints/.iter_0000004.incomplete\S*: the file may not grow any further\n",
        error,
    )
    assert [path.name for path in (directory / "full" / "checkpoints").glob("iter_*")] == ["iter_0000002"]
    job = Job(harness.arguments(directory, "full")).wait()
    assert "passed over .iter_0000004.incomplete" in job.stdout[0]
    assert_equal(directory / "full", reference)


def test_a_disk_that_fills_while_training(directory, reference):
    """No space is left for the metrics of a step: a one-line error names the file, and the run resumes from
    the last checkpoint once there is space."""
    metrics = directory / "filled" / "metrics.jsonl"

    checkpoint = directory / "filled" / "checkpoints" / "iter_0000002"

    def fill():
        for _ in range(600):  # saved in the background, which must not meet the limit
            if checkpoint.is_dir():
                break
            time.sleep(0.1)
        harness.no_room(metrics.stat().st_size + 20)()

    command = harness.arguments(directory, "filled", log={"tensorboard": True})
    job = Job(command, before("train_step", 3, 0, fill)).wait()
    assert job.statuses == [1] * RANKS, job.printed
    (error,) = [text for text in job.stderr if text]
    assert error == (
        f"error: {metrics}: the file may not grow any further; make room, and the same command continues "
        "from the last checkpoint\n"
    )
    assert not metrics.read_bytes().endswith(b"\n"), "no line was truncated"
    assert [path.name for path in (directory / "filled" / "checkpoints").glob("iter_*")] == ["iter_0000002"]
    assert Job(command).wait().statuses == DONE
    assert_equal(directory / "filled", reference)


def test_gradients_that_are_not_finite(directory):
    """One bad element on one rank: all ranks skip the step, count it and record evidence; too many skipped
    steps end the run."""
    command = harness.arguments(directory, "poisoned", guard={"max_skipped_steps": 1})
    job = Job(command, harness.broken_gradients({2, 4, 5})).wait()
    assert job.statuses == [1] * RANKS
    (error,) = [text for text in job.stderr if text]
    assert (
        error.strip()
        .splitlines()[-1]
        .startswith("FloatingPointError: loss or gradient not finite in 2 steps")
    )
    lines = read_metrics(directory / "poisoned")
    assert [line.get("skipped_steps") for line in lines] == [None, 1, None, 2]
    assert lines[1]["grad_norm"] is None and lines[0]["lr"] == lines[1]["lr"] < lines[2]["lr"]
    evidence = directory / "poisoned" / "evidence" / "iter_0000002"
    names = json.loads((evidence / "rank_1.json").read_text())
    assert names == {"chunk 0: module.decoder.final_layernorm.weight": {"not_finite": 1, "elements": 32}}
    batch = json.loads((evidence / "batch.json").read_text())
    assert len(batch["batch"]) == 4 and all(sample["response_ids"] for sample in batch["batch"])
    assert "ALARM: step 2 was skipped" in job.stdout[0]


def test_a_flipped_exponent_bit_of_a_gradient(directory):
    """The element is finite but its square is not: the step is skipped, not clipped to zero."""
    command = harness.arguments(directory, "flipped")
    job = Job(command, harness.flipped_gradient_bit(2, 1, bit=30)).wait()
    assert job.statuses == DONE, job.printed
    assert [line.get("skipped_steps") for line in read_metrics(directory / "flipped")][1] == 1
    (found,) = json.loads((directory / "flipped/evidence/iter_0000002/rank_1.json").read_text()).values()
    assert found["not_finite"] == 1
    assert "ALARM: step 2 was skipped" in job.stdout[0]


def test_weights_that_are_not_finite(directory, reference):
    """One weight on one rank is NaN from step 3 on: steps are skipped, sampling continues as long as the
    guard allows, nothing of this is saved, and the next start resumes as if nothing had happened."""
    command = harness.arguments(directory, "rotten")
    job = Job(command, harness.damaged_weight(3, 1)).wait()
    assert job.statuses == [1] * RANKS, job.printed
    (error,) = [text.strip().splitlines()[-1] for text in job.stderr if text]
    assert error.startswith("FloatingPointError: loss or gradient not finite in 4 steps in a row")
    assert "the student's weight module.decoder.final_layernorm.weight is not finite in 1 of 32" in error
    assert "on rank 1" in error and "the weights in memory are damaged" in error
    lines = read_metrics(directory / "rotten")
    assert [line.get("skipped_steps") for line in lines] == [None, None, 1, 2, 3]
    assert [path.name for path in (directory / "rotten/checkpoints").glob("iter_*")] == ["iter_0000002"]
    evidence = [json.loads(p.read_text()) for p in (directory / "rotten/evidence").glob("iter_*/batch.json")]
    causes = [cause for batch in evidence for cause in batch["causes"]]
    assert any("the sampler's log-prob is nan" in cause for cause in causes), causes
    job = Job(command).wait()
    assert job.statuses == DONE, job.printed
    assert "resume" in job.stdout[0] or "step 3/6" in job.stdout[0]
    assert fingerprint(directory / "rotten") == fingerprint(reference)


def test_a_hang_is_cut_with_every_rank_s_stack(directory):
    """Rank 1 sleeps in an optimizer step while rank 0 waits for it in a collective."""
    job = Job(harness.arguments(directory, "hanging"), harness.hang(2, 1, timeout=5)).wait()
    assert job.statuses == [1] * RANKS, job.printed
    for rank in range(RANKS):
        stack = (directory / "hanging" / "stacks" / f"rank_{rank}.txt").read_text()
        assert f"rank {rank}: " in stack and "phase 'optimizer step 2'" in stack
        assert stack in job.stderr[rank]
    assert "time.sleep(600)" in (directory / "hanging" / "stacks" / "rank_1.txt").read_text()
    waiting = (directory / "hanging" / "stacks" / "rank_0.txt").read_text()
    assert "instruction" in waiting and "of stage 0" in waiting and "all_reduce" in waiting
    assert sum("guard.hang_timeout_minutes" in text for text in job.stderr) == 1


def test_random_kills(directory, reference):
    """`kill -9` of a random rank at five random moments; `python -m tests.faults.kill_points` tries more."""
    tally = harness.Tally()
    harness.survive(directory, "killed", 5, random.Random(7), 8.0, tally)
    assert tally.deaths >= 1
    assert fingerprint(directory / "killed") == fingerprint(reference)
    found, expected = (_runs.comparable(path) for path in (directory / "killed", reference))
    # A rank may have died while sampling (see the next test); `rollout_entropy` comes from the log-probs.
    assert harness.agree(found, expected)
    found, expected = (
        [{k: v for k, v in line.items() if not k.startswith("rollout_entropy")} for line in lines]
        for lines in (found, expected)
    )
    assert found == expected


def test_killed_while_sampling(directory, reference):
    """Finished responses are not sampled again, and the others continue as they would have."""
    command = harness.arguments(directory, "sampling")
    job = Job(command, harness.kill_while_sampling(2, 1, 2)).wait()
    assert job.statuses == [1, -signal.SIGKILL], job.printed
    assert job.stderr[0].strip().splitlines()[-1].startswith("error: rank 1 exited without an error message")
    job = Job(command).wait()
    assert job.statuses == DONE, job.printed
    pattern = r"rollout batch 1: \d+ of \d+ responses were sampled before the run was interrupted"
    assert re.search(pattern, job.stdout[0]), job.stdout[0]
    assert fingerprint(directory / "sampling") == fingerprint(reference)
    # Continued rows are in different batches, so their log-probs agree only up to rounding.
    for line, expected in zip(
        _runs.comparable(directory / "sampling"), _runs.comparable(reference), strict=True
    ):
        assert line == {
            key: pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            for key, value in expected.items()
        }


def test_batches_sampled_ahead_resume_exactly(directory):
    """Two batches in the checkpoint wait for their steps; they were sampled with older weights."""
    ahead = {"rollout": {"batches_ahead": 1}}
    job = Job(harness.arguments(directory, "ahead", **ahead)).wait()
    assert job.statuses == DONE, job.printed
    command = harness.arguments(directory, "ahead_killed", **ahead)
    job = Job(command, before("train_step", 4, 0, lambda: os.kill(os.getpid(), signal.SIGKILL))).wait()
    assert job.statuses == [-signal.SIGKILL, 1], job.printed
    job = Job(command).wait()
    assert job.statuses == DONE, job.printed
    assert "ALARM: rollout batch" not in job.stdout[0]
    assert_equal(directory / "ahead_killed", directory / "ahead")


def test_the_faults_replace_what_train_calls():
    """The harness tests nothing unless these names are looked up when they are called."""
    callers = (inspect.unwrap(train.train), train.iterate)
    looked_up = {name for caller in callers for name in caller.__code__.co_names}
    assert looked_up >= {"build_run", "resume", "sample", "train_step", "save"}


def test_mutated_configurations_train_or_name_a_key(tmp_path, monkeypatch):
    """Forty cases of `python -m tests.faults.fuzz_configs`; one in three of the accepted ones is trained."""
    monkeypatch.chdir(tmp_path)
    fuzzer = fuzz_configs.Fuzzer(tmp_path, train_every=3)
    fuzzer.run(40, seed=1)
    assert not fuzzer.failures
    assert fuzzer.tally["refused"] > 10 and fuzzer.tally["trained"] > 0


def test_damaged_inputs_are_read_or_refused(tmp_path):
    """Ten cases of `python -m tests.faults.fuzz_inputs`."""
    tally, failures = fuzz_inputs.fuzz(tmp_path, 10, seed=2, seconds=60)
    assert not failures
    assert sum(tally.values()) == 10
