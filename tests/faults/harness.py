"""Complete runs on forked ranks, with a fault injected at a chosen point.

`Job(arguments, fault).wait()` starts `python -m megatron_mopd.train ARGUMENTS` on two ranks as torchrun
would, calls `fault(rank)` in each before it begins (to inject the fault), and collects statuses and output.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from megatron_mopd import train
from megatron_mopd.losses import batch_loss
from megatron_mopd.losses.teacher_scores import TeacherScores
from megatron_mopd.model import background_save
from megatron_mopd.rollout import write_ahead
from megatron_mopd.run import lifecycle
from megatron_mopd.training import step
from tests import _runs
from tests._agent import Agent

RANKS = 2
PATIENCE = float(os.environ.get("FAULT_PATIENCE", "120"))
"""Seconds that a run may take, and that the other ranks may take to exit after the first one."""
LAUNCHER_PATIENCE = 30.0
"""Seconds from torchrun's SIGTERM to its SIGKILL."""
TIME_TO_END = 30.0
"""Seconds from a rank's death to the end of the whole job."""


class Job:
    """One start of a run. `statuses`, `stdout` and `stderr` are available after `wait`."""

    def __init__(
        self,
        arguments: list[str],
        fault: Callable[[int], None] | None = None,
        ranks: int = RANKS,
        as_launcher: bool = False,
        kill: tuple[int, float] | None = None,
    ):
        """as_launcher: send SIGTERM to the other ranks at the first failure, as torchrun does. kill: (rank,
        seconds): kill this rank so many seconds after the start, wherever it is."""
        self._as_launcher, self._kill, self._started = as_launcher, kill, time.monotonic()
        context = multiprocessing.get_context("fork")
        self._directory = tempfile.TemporaryDirectory()
        self._agent = Agent()
        self.processes = [
            context.Process(
                target=_rank, args=(rank, ranks, self._agent, self._directory.name, arguments, fault)
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 2 * PATIENCE) -> Job:
        """Wait until all ranks have exited. Fails if some still run long after the first exited."""
        deadline = time.monotonic() + timeout
        first_end = None
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.02)
            if self._kill is not None and time.monotonic() - self._started > self._kill[1]:
                self.processes[self._kill[0]].kill()
                self._kill = None
            if first_end is None and not all(process.is_alive() for process in self.processes):
                first_end = time.monotonic()
                deadline = min(deadline, first_end + PATIENCE)
                self.first_end_at = first_end - self._started
                if self._as_launcher and any(process.exitcode for process in self.processes):
                    for process in self.processes:
                        process.terminate()
                    deadline = min(deadline, first_end + LAUNCHER_PATIENCE)
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        self._agent.close()
        self.statuses = [process.exitcode for process in self.processes]
        self.seconds_to_end = time.monotonic() - first_end if first_end else timeout
        directory = Path(self._directory.name)
        self.stdout, self.stderr = (
            [(directory / f"{rank}.{kind}").read_text() for rank in range(len(self.processes))]
            for kind in ("out", "err")
        )
        self.killed_by_launcher = hung if self._as_launcher else []
        assert self._as_launcher or not hung, f"ranks {hung} did not end:\n{self.printed}"
        return self

    @property
    def printed(self) -> str:
        return "\n".join(text for pair in zip(self.stdout, self.stderr) for text in pair if text)


def _rank(rank, ranks, agent, directory, arguments, fault) -> None:
    if fault is not None:
        fault(rank)
    _runs._rank(rank, ranks, agent, Path(directory), arguments)


def configuration(directory: Path, name: str, **sections) -> dict:
    """A run with all the state that must survive a restart: sampling, a teacher, dropout, rollout batches of
    two steps, a learning-rate schedule. `name`: its run directory under `directory`.
    """
    values = {
        "run_dir": str(directory / name),
        "student": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "num_layers": 1},
        "teachers": [{"name": "self"}],
        "routing": {"default": "self"},
        "objective": {"kind": "full_vocab_kl", "per_domain": {"add": "sft"}},
        "optimizer": {"lr": 1e-3, "lr_decay_style": "linear", "lr_warmup_iters": 3},
        "schedule": {
            "train_iters": 6,
            "steps_per_rollout": 2,
            "global_batch_size": 4,
            "micro_batch_size": 2,
        },
        "checkpoint": {"save_interval": 2},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys if isinstance(keys, dict) else keys
    values["student"] = dict(_runs.MODEL) | values["student"]
    return _runs.values(directory, **values)


def arguments(directory: Path, name: str, **sections) -> list[str]:
    """The command line of `configuration`."""
    return _runs.write_config(directory / f"{name}.yaml", configuration(directory, name, **sections))


def fingerprint(run_dir: Path, iteration: int = 6) -> dict[str, str]:
    """A checkpoint's contents, bit-exact: weights and optimizer state."""
    return _runs.contents(run_dir / "checkpoints" / f"iter_{iteration:07d}")


def agree(found: list[dict], expected: list[dict]) -> bool:
    """Whether two runs' metrics have the same keys and values, with floats equal up to rounding."""

    def alike(a, b) -> bool:
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-8) if isinstance(a, float) else a == b

    return len(found) == len(expected) and all(
        a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a) for a, b in zip(found, expected)
    )


# Faults, injected by `fault(rank)`. `train` looks up functions when it calls them, so they can be replaced.


def before(
    name: str, number: int, victim: int, act: Callable[[], None], module: ModuleType = train
) -> Callable[[int], None]:
    """Call `act` on rank `victim` when `module.NAME` is called for the `number`-th time (from 1)."""

    def fault(rank: int) -> None:
        if rank != victim:
            return
        original, calls = getattr(module, name), [0]

        def wrapped(*args, **kwargs):
            calls[0] += 1
            if calls[0] == number:
                act()
            return original(*args, **kwargs)

        setattr(module, name, wrapped)

    return fault


def kill_after(seconds: float) -> Callable[[], None]:
    """`kill -9` this process after so many seconds, wherever it is."""

    def act() -> None:
        def die() -> None:
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=die, daemon=True).start()

    return act


def kill_while_sampling(number: int, victim: int, records: int) -> Callable[[int], None]:
    """Log every token immediately, and `kill -9` rank `victim` in its `number`-th rollout after it has
    logged this many records."""

    def fault(rank: int) -> None:
        write_ahead.FLUSH_SECONDS = 0.0

        def act() -> None:
            append, left = write_ahead.RolloutLog.append, [records]

            def counted(self, pieces):
                append(self, pieces)
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

            write_ahead.RolloutLog.append = counted

        before("sample", number, victim, act)(rank)

    return fault


def random_kill(rng: random.Random, seconds: float) -> tuple[str, dict]:
    """Kill a random rank at a random moment, of a run that takes about `seconds` or of a random phase.

    Returns a description, and keyword arguments for `Job`.
    """
    victim = rng.randrange(RANKS)
    if rng.random() < 0.5:
        after = rng.uniform(0, seconds)
        return f"rank {victim}, {after:.2f} s after the start", {"kill": (victim, after)}
    if rng.random() < 0.4:  # while a checkpoint is written, checksummed or moved into place
        name, number = rng.choice(["plan_save", "sum_up", "put_in_place"]), rng.randint(1, 2)
        victim = 0 if name == "put_in_place" else victim
        after = rng.uniform(0, 0.02)
        description = f"rank {victim}, {after:.3f} s into call {number} of {name}"
        return description, {"fault": before(name, number, victim, kill_after(after), background_save)}
    name = rng.choice(["build_run", "resume", "sample", "train_step", "save", "save"])
    number = 1 if name in ("build_run", "resume") else rng.randint(1, 2)
    after = rng.uniform(0, 0.3)
    description = f"rank {victim}, {after:.2f} s into call {number} of {name}"
    return description, {"fault": before(name, number, victim, kill_after(after))}


def broken_gradients(steps: set[int], victim: int = 1, value: float = float("nan")) -> Callable[[int], None]:
    """On rank `victim`, set one gradient element to `value` in the given optimizer steps (from 1)."""

    def fault(rank: int) -> None:
        if rank != victim:
            return
        original, calls = step.all_finite, [0]

        def wrapped(loss, chunks, groups):
            calls[0] += 1
            if calls[0] in steps:
                dict(chunks[0].named_parameters())["module.decoder.final_layernorm.weight"].main_grad[3] = (
                    value
                )
            return original(loss, chunks, groups)

        step.all_finite = wrapped

    return fault


def flipped_gradient_bit(number: int, victim: int, bit: int) -> Callable[[int], None]:
    """On rank `victim`, flip one bit of one float32 gradient element that its optimizer reads, in its
    `number`-th step."""

    def fault(rank: int) -> None:
        if rank != victim:
            return
        original, calls = step.all_finite, [0]

        def wrapped(loss, chunks, groups):
            calls[0] += 1
            if calls[0] == number:
                # A rank's distributed optimizer reads its own shard of the reduced gradients.
                buffer = chunks[0].buffers[0]
                bits = buffer.buckets[0].grad_data.view(torch.int32)
                mine = bits.chunk(buffer.data_parallel_world_size)[buffer.data_parallel_group.rank()]
                mine[mine.nonzero()[0]] ^= torch.tensor(1 << bit).to(torch.int32)
            return original(loss, chunks, groups)

        step.all_finite = wrapped

    return fault


def broken_logits(number: int, victim: int, value: float = float("nan")) -> Callable[[int], None]:
    """On rank `victim`, set one element of the student's last hidden states to `value` in its `number`-th
    step."""

    def fault(rank: int) -> None:
        original = batch_loss.response_hidden

        def act() -> None:
            def poisoned(*args):
                batch_loss.response_hidden = original
                rows = original(*args).clone()
                rows.view(-1)[0] = value
                return rows

            batch_loss.response_hidden = poisoned

        before("train_step", number, victim, act)(rank)

    return fault


def broken_teacher(number: int, victim: int, value: float = float("nan")) -> Callable[[int], None]:
    """On rank `victim`, fill a teacher's hidden states of one micro-batch with `value` in its `number`-th
    step."""

    def fault(rank: int) -> None:
        def act() -> None:
            original = TeacherScores.keep

            def poisoned(self, teacher, micro_batch, hidden):
                TeacherScores.keep = original
                original(self, teacher, micro_batch, torch.full_like(hidden, value))

            TeacherScores.keep = poisoned

        before("train_step", number, victim, act)(rank)

    return fault


def damaged_weight(number: int, victim: int, value: float = float("nan")) -> Callable[[int], None]:
    """On rank `victim`, permanently set one weight of the student to `value` before its `number`-th step."""

    def fault(rank: int) -> None:
        if rank != victim:
            return
        original, calls = train.train_step, [0]

        def wrapped(learner, *rest):
            calls[0] += 1
            if calls[0] == number:
                named = dict(learner.chunks[0].named_parameters())
                named["module.decoder.final_layernorm.weight"].data[3] = value
            return original(learner, *rest)

        train.train_step = wrapped

    return fault


def hang(
    number: int, victim: int, timeout: float, how: Callable[[], None] = lambda: time.sleep(600)
) -> Callable[[int], None]:
    """Rank `victim` sleeps (or calls `how`) in its `number`-th optimizer step. Only from then on do the
    watchdogs use the short `timeout`, in seconds, so that a slow start-up does not trigger them.
    """

    def fault(rank: int) -> None:
        made = []

        class Recorded(lifecycle.Watchdog):
            def __init__(self, *args):
                super().__init__(*args)
                made.append(self)

        def act() -> None:
            # The other ranks' timeout is longer, so that a victim that still can reports first.
            made[0]._timeout = timeout if rank == victim else 3 * timeout
            if rank == victim:
                how()

        lifecycle.Watchdog = Recorded
        before("train_step", number, rank, act)(rank)

    return fault


def no_room(size: int) -> Callable[[], None]:
    """Limit the files that this process writes to `size` bytes from now on, as on a full disk."""

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return act


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@dataclass
class Tally:
    """Counts of the random kills of `survive`."""

    deaths: int = 0
    during_a_save: int = 0
    """Deaths that left an incomplete checkpoint."""
    late: int = 0
    """Deaths after which the whole job took more than `TIME_TO_END` to exit."""
    slowest: float = 0.0
    """Longest time from a death to the end of the whole job, in seconds."""


def survive(
    directory: Path, name: str, kills: int, rng: random.Random, seconds: float, tally: Tally, say=print
) -> None:
    """Restart the run `name` after each of `kills` random deaths, then let it finish.

    seconds: the duration of an undisturbed run. Fails if a job neither dies of the kill nor succeeds.
    """
    command = arguments(directory, name)
    for _ in range(kills):
        description, fault = random_kill(rng, seconds)
        job = Job(command, as_launcher=True, **fault).wait()
        happened = -signal.SIGKILL in job.statuses
        incomplete = len(list((directory / name / "checkpoints").glob(".*.incomplete")))
        tally.deaths += happened
        tally.during_a_save += happened and incomplete
        outcome = f"died, {job.seconds_to_end:.1f} s to the end" if happened else "was over before"
        say(f"{name}: {description}: {outcome}{', a save was incomplete' if incomplete else ''}")
        if not happened:
            break
        tally.slowest = max(tally.slowest, job.seconds_to_end)
        tally.late += job.seconds_to_end > TIME_TO_END
    if happened:
        job = Job(command).wait()
    assert job.statuses == [0] * RANKS, job.printed


def write_inputs(directory: Path) -> None:
    torch.set_num_threads(1)
    _runs.write_inputs(directory)
