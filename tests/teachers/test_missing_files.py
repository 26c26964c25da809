"""A teacher's file that disappears during the run: every rank reports it, and the checkpoint is intact."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megatron_mopd.teachers.bank import TeacherBank
from tests import _runs
from tests.faults import harness
from tests.faults.harness import RANKS, Job, before, fingerprint

STEPS = 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("missing")
    harness.write_inputs(directory)
    job = Job(harness.arguments(directory, "first", schedule={"train_iters": 2})).wait()
    assert job.statuses == [0] * RANKS, job.printed
    return directory


def arguments(directory, name):
    """Three teachers in files and two slots, so that all are read in every step."""
    checkpoint = str(directory / "first" / "checkpoints")
    teachers = [{"name": "self"}] + [{"name": name, "load": checkpoint} for name in ("math", "code")]
    return harness.arguments(
        directory,
        name,
        teachers=teachers,
        routing={"default": {"self": 1.0, "math": 1.0, "code": 1.0}},
        teacher_storage={"mode": "mmap"},
        schedule={"train_iters": STEPS},
    )


@pytest.fixture(scope="module")
def reference(directory):
    job = Job(arguments(directory, "reference")).wait()
    assert job.statuses == [0] * RANKS, job.printed
    return directory / "reference"


def remove(run_dir: Path) -> None:
    files = list((run_dir / "teachers" / "code").glob("*.weights"))
    assert files
    for path in files:
        path.unlink()


def after_the_check(number: int, run_dir: Path):
    """Delete the files in the middle of a step, just after all ranks have agreed that they exist."""

    def fault(rank: int) -> None:
        original, calls = TeacherBank.check_files, [0]

        def wrapped(self, names):
            original(self, names)
            calls[0] += 1
            if rank == 1 and calls[0] == number:
                remove(run_dir)

        TeacherBank.check_files = wrapped

    return fault


def messages(job: Job) -> list[str]:
    """The error message of each rank, printed or not."""
    paths = [Path(job._directory.name) / f"{rank}.failure" for rank in range(RANKS)]
    return [path.read_text() if path.exists() else "" for path in paths]


def assert_checkpoint_is_there(run_dir: Path) -> None:
    checkpoints = run_dir / "checkpoints"
    assert [path.name for path in checkpoints.glob("iter_*")] == ["iter_0000002"]
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


def test_between_two_steps_all_ranks_raise_the_same_error(directory, reference):
    run_dir = directory / "between"
    fault = before("train_step", 3, 1, lambda: remove(run_dir))
    job = Job(arguments(directory, "between"), fault).wait()
    assert job.statuses == [1] * RANKS, job.printed
    for message in messages(job):
        assert "teacher 'code'" in message and str(run_dir / "teachers") in message
        assert "cannot be read: No such file" in message and "resume from it" in message
    assert sum("resume from it" in text for text in job.stderr) == 1, f"not printed by one rank: {job.stderr}"
    assert_checkpoint_is_there(run_dir)


def test_within_a_step_the_job_ends_and_a_resume_gives_the_same_run(directory, reference):
    """The first rank that reads reports the missing file; the launcher stops those that wait for it."""
    run_dir = directory / "within"
    job = Job(arguments(directory, "within"), after_the_check(3, run_dir), as_launcher=True).wait()
    assert 1 in job.statuses and set(job.statuses) <= {1, -signal.SIGTERM}, job.printed
    told = [message for message in messages(job) if "teacher 'code'" in message]
    assert told and all("cannot be read: No such file" in text and "resume from it" in text for text in told)
    assert "cannot be read: No such file" in job.printed
    assert_checkpoint_is_there(run_dir)
    job = Job(arguments(directory, "within")).wait()
    assert job.statuses == [0] * RANKS, job.printed
    assert _runs.comparable(run_dir) == _runs.comparable(reference)
    assert fingerprint(run_dir, STEPS) == fingerprint(reference, STEPS)
