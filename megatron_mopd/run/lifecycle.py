"""Everything around the algorithm during a run: watchdog, logs, evaluations, checkpoints, stop requests."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from megatron_mopd.backend.host_memory import long_lived_objects
from megatron_mopd.backend.parallel import seed_model_parallel
from megatron_mopd.backend.watchdog import Watchdog
from megatron_mopd.config import save_config
from megatron_mopd.losses.token_samples import TokenSamples
from megatron_mopd.model.background_save import CheckpointWriter
from megatron_mopd.observe.access import others_may_enter
from megatron_mopd.observe.pictures import draw_report
from megatron_mopd.observe.progress import phase, say
from megatron_mopd.observe.run_log import RunLog
from megatron_mopd.run.alarms import Alarms, rollout_metrics
from megatron_mopd.run.best_checkpoint import BestCheckpoint
from megatron_mopd.run.evaluation import evaluation, evaluation_fingerprint
from megatron_mopd.run.preemption import Preempted, StopRequest
from megatron_mopd.run.resumable import checkpoints_directory
from megatron_mopd.run.setup import Run, run_directory
from megatron_mopd.run.step_report import alarms_of, sample_lines, time_split, token_samples
from megatron_mopd.training.step_batch import StepBatch


class Lifecycle(contextlib.AbstractContextManager):
    """Monitors and logs one run from iteration `first` on, and decides when to sample, evaluate, save and
    stop; every rank makes the same decisions.

    Entering it logs the run's start and starts the watchdog; leaving it stops the watchdog and closes the
    logs. `finish` completes a run after its last iteration.
    """

    def __init__(self, run: Run, first: int, alarms: Alarms):
        """Collective: see `BestCheckpoint`."""
        self._run, self._config, self._alarms = run, run.config, alarms
        self.first, self.last = first, run.config.schedule.train_iters
        self.writer = CheckpointWriter()
        self._directory = run_directory(run.config)
        if run.groups.rank == 0:
            save_config(run.config, self._directory / "config.yaml")
        self._log = RunLog(run.config, first)
        self._best = BestCheckpoint(
            checkpoints_directory(run.config.run_dir),
            run.config.checkpoint.best_metric,
            first,
            evaluation_fingerprint(run),
        )
        timeout = 60 * run.config.guard.hang_timeout_minutes
        self._watchdog = Watchdog(timeout, self._directory / "stacks")
        self._stop = StopRequest(run.groups)
        self._contexts = contextlib.ExitStack()
        self._sampled_until = first
        self._is_asked = False
        """Whether any rank was asked to stop; updated at the end of each rollout batch."""
        self._iteration_start = self._sampling_end = 0.0
        self._between: dict[str, float] = {}
        """Seconds spent between the last step and the next."""

    def __enter__(self) -> Lifecycle:
        run = self._run
        say(f"responses end with {run.stop_ids.described(run.tokenizer)}")
        if warning := others_may_enter(self._directory):
            say(warning)
        self._log.started(run.learner.manifest, run.groups.world_size, run.groups.device, run.confinement)
        for message in run.start_alarms if self.first == 0 else ():
            self._log.alarm(0, message)
        self._contexts.enter_context(contextlib.closing(self._log))
        for context in (self._watchdog, self._stop, long_lived_objects()):
            self._contexts.enter_context(context)
        return self

    def __exit__(self, *exception) -> None:
        self._contexts.__exit__(*exception)

    def iterations(self) -> Iterator[int]:
        """The remaining iterations. Raises if the run's lock was lost or the last checkpoint failed."""
        for iteration in range(self.first, self.last):
            self.writer.check()
            if self._run.lock is not None:
                self._run.lock.check()
            self._iteration_start = time.perf_counter()
            yield iteration

    def rollouts_due(self, iteration: int) -> Iterator[int]:
        """The first iterations of the rollout batches that must be sampled before training `iteration`: its
        own batch and `rollout.batches_ahead` more."""
        steps = self._config.schedule.steps_per_rollout
        reach = min(iteration + self._config.rollout.batches_ahead * steps, self.last - 1)
        while self._sampled_until <= reach:
            upcoming, self._sampled_until = self._sampled_until, self._sampled_until + steps
            self._watchdog.begin(f"rollout for iteration {upcoming + 1}")
            yield upcoming

    def begin_step(self, batch: StepBatch) -> TokenSamples | None:
        """Prepare for the optimizer step on `batch`; returns the collector of its per-token divergences if
        the step is one of those sampled for the report."""
        self._sampling_end = time.perf_counter()
        self._watchdog.begin(f"optimizer step {batch.iteration + 1}")
        # Seed dropout per step, so that a resumed run draws the same numbers.
        seed_model_parallel(self._config.seed + 1_000_003 * batch.iteration)
        return token_samples(self._run, batch)

    def end_step(
        self, batch: StepBatch, metrics: dict[str, float], samples: TokenSamples | None
    ) -> dict[str, float]:
        """All metrics of the step; also reports its alarms."""
        run, done = self._run, batch.iteration + 1
        now, start = time.perf_counter(), self._iteration_start
        metrics = metrics | time_split(run, batch, metrics, self._sampling_end - start, now - start)
        metrics |= self._between
        self._between = {}
        observed = rollout_metrics(batch.trajectories, batch.rewards.collect())
        metrics |= observed
        for message in alarms_of(run, self._alarms, batch, metrics, observed):
            say(f"ALARM: {message}")
            self._log.alarm(done, message)
        if samples is not None:
            self._log.samples(done, sample_lines(run, batch, samples))
        return metrics

    def evaluate(self, done: int) -> dict[str, float]:
        """Metrics of the evaluation after `done` iterations; none if it is not due."""
        if done != self.last and not _is_every(self._config.schedule.eval_interval, done):
            return {}
        self._watchdog.begin(f"evaluation after iteration {done}")
        begun = time.perf_counter()
        metrics = evaluation(self._run)
        return metrics | {"time/evaluate": time.perf_counter() - begun} if metrics else {}

    def log(self, done: int, metrics: dict[str, float]) -> None:
        """Log the metrics after `done` iterations."""
        self._log.step(done, metrics)

    def save_is_due(self, done: int, metrics: dict[str, float]) -> bool:
        """Whether to save a checkpoint: at an interval, at the end, for the best weights so far, or because
        the run was asked to stop. Collective: `StopRequest.agreed`."""
        # Never save weights that are not finite; the guard decides whether the run continues.
        if self._run.learner.skipped.weights_damaged:
            return False
        is_regular = done == self.last or _is_every(self._config.checkpoint.save_interval, done)
        # A run cannot resume in the middle of a rollout batch: its samples are only in memory.
        if done % self._config.schedule.steps_per_rollout:
            return is_regular
        self._is_asked = self._stop.agreed() and done < self.last
        is_best = self._config.checkpoint.save_best and self._best.is_new(metrics)
        return is_regular or self._is_asked or is_best

    @contextlib.contextmanager
    def saving(self, done: int, metrics: dict[str, float]) -> Iterator[bool | None]:
        """Surrounds passing the checkpoint of `done` iterations to the writer. Yields whether it must include
        optimizer state: true for a run that was asked to stop, which must be resumable; otherwise `None`,
        which leaves it to the configuration."""
        self._watchdog.begin(f"checkpoint of iteration {done}")
        self._best.saved(done, metrics)
        begun = time.perf_counter()
        with phase(f"saving iteration {done}", often=True):
            yield True if self._is_asked else None
        self._between["time/save"] = time.perf_counter() - begun

    def stop_if_asked(self, done: int) -> None:
        """If the run was asked to stop, raise `Preempted` on every rank once the checkpoint is complete."""
        if self._is_asked:
            self.writer.wait()
            self._run.lifeline.release()
            raise Preempted(done)

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """After the last iteration, complete the last checkpoint. Returns the run's last metrics: `metrics`,
        or an evaluation of the student if there was no iteration to run."""
        self._watchdog.begin("the last checkpoint")
        self.writer.wait()
        if self._run.learner.skipped.weights_damaged:
            raise FloatingPointError(
                "the student's weights are not finite after the last step (see evidence/); the same command "
                "continues from the last checkpoint"
            )
        if self.first < self.last:
            return metrics
        if metrics := evaluation(self._run):
            self._log.step(self.first, metrics)
        return metrics


def close(run: Run) -> None:
    """Stop everything a finished run started (teacher loading, lifeline, verifiers) and draw its report.
    Collective over the pipeline."""
    if run.learner.bank is not None:
        run.learner.bank.close()
    run.lifeline.release()
    run.rewarder.close()
    if run.config.log.report:
        run.learner.pipeline.draw(run_directory(run.config), run.config.schedule.steps_per_rollout)
        if run.groups.rank == 0:
            draw_report(run.config.run_dir)


def _is_every(interval: int, iteration: int) -> bool:
    return interval > 0 and iteration % interval == 0
