"""Multi-teacher on-policy distillation, on one page.

    python -m megatron_mopd.train --config FILE.yaml [section.key=value ...]
    torchrun --nproc-per-node N -m megatron_mopd.train --config FILE.yaml [section.key=value ...]

Each iteration the student samples its own trajectories, the teachers of each trajectory's domain score them,
and the student is pulled towards those teachers by reverse KL over the full vocabulary. With
`objective.kind=sft` the trajectories are the data's own answers and there is nothing to score.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence

import torch.distributed as dist

from megatron_mopd.backend.failure import is_first_to_fail
from megatron_mopd.backend.host_memory import long_lived_objects
from megatron_mopd.backend.lifeline import LIFELINE_NOTICES
from megatron_mopd.backend.messages import visible
from megatron_mopd.backend.parallel import seed_model_parallel
from megatron_mopd.backend.watchdog import Watchdog
from megatron_mopd.backend.whole_files import disk_problem
from megatron_mopd.config import Config, ConfigError, load_config, save_config
from megatron_mopd.config.objectives import samples_per_prompt
from megatron_mopd.data.prompts import PromptSampler
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.model.background_save import CheckpointWriter, SaveError
from megatron_mopd.observe.access import closed_to_others, others_may_enter
from megatron_mopd.observe.progress import phase, say
from megatron_mopd.observe.report import draw_report
from megatron_mopd.observe.run_log import RunLog
from megatron_mopd.rollout.routing import RoutingRecords
from megatron_mopd.training.best import BestCheckpoint
from megatron_mopd.training.checkpoint import check_space, resume, save
from megatron_mopd.training.evaluate import evaluation, evaluation_fingerprint
from megatron_mopd.training.monitors import Alarms, rollout_metrics
from megatron_mopd.training.preemption import INTERRUPTED_STATUS, PREEMPTED_STATUS, Preempted, StopRequest
from megatron_mopd.training.resume import FinishedRun, checkpoints_directory
from megatron_mopd.training.rollout_log import open_rollout_log
from megatron_mopd.training.sampling import draw_trajectories
from megatron_mopd.training.setup import Run, build_run, run_directory
from megatron_mopd.training.step import StepBatch, plan_steps, train_step
from megatron_mopd.training.step_record import alarms_of, samples_of, start_sampling_tokens, time_split


@closed_to_others()
def train(config: Config) -> dict[str, float]:
    """The whole run: build, then for each iteration sample -> score -> learn -> save. Returns the last
    metrics; none where the run was finished already, of which nothing is touched then.

    Raises `Preempted` on every rank when the run was asked to stop and has saved.
    """
    try:
        run = build_run(config)
    except FinishedRun as finished:
        say(str(finished))
        return {}
    with run.lock or contextlib.nullcontext():
        return _train(run)


def _train(run: Run) -> dict[str, float]:
    config, alarms = run.config, Alarms()
    first = resume(run.learner, alarms, run.resumable)
    check_space(run.learner)
    say(f"responses end with {run.stop_ids.described(run.tokenizer)}")
    if run.groups.rank == 0:
        save_config(config, run_directory(config) / "config.yaml")
    if warning := others_may_enter(run_directory(config)):
        say(warning)
    log = RunLog(config, first)
    log.started(run.learner.manifest, run.groups.world_size, run.groups.device, run.confinement)
    for message in run.start_alarms if first == 0 else ():
        log.alarm(0, message)
    directory, metric = checkpoints_directory(config.run_dir), config.checkpoint.best_metric
    best = BestCheckpoint(directory, metric, first, evaluation_fingerprint(run))
    watchdog = Watchdog(60 * config.guard.hang_timeout_minutes, run_directory(config) / "stacks")
    with contextlib.closing(log), watchdog, StopRequest(run.groups) as stop, long_lived_objects():
        metrics = iterate(run, first, alarms, log, best, watchdog, stop)
    if run.learner.bank is not None:
        run.learner.bank.close()
    run.lifeline.release()
    run.rewarder.close()
    if config.log.report:
        if run.learner.pipeline is not None:
            run.learner.pipeline.draw(run_directory(config), config.schedule.steps_per_rollout)
        if run.groups.rank == 0:
            draw_report(config.run_dir)
    return metrics


def iterate(
    run: Run,
    first: int,
    alarms: Alarms,
    log: RunLog,
    best: BestCheckpoint,
    watchdog: Watchdog,
    stop: StopRequest,
) -> dict[str, float]:
    """Every iteration from `first` on; the last one's metrics."""
    config, last = run.config, run.config.schedule.train_iters
    sampler = PromptSampler(run.prompts, config.seed)
    metrics: dict[str, float] = {}
    batches: deque[StepBatch] = deque()  # optimizer steps whose samples are there
    sampled_for = first
    saver = CheckpointWriter()
    aside: dict[str, float] = {}  # seconds between two steps
    for iteration in range(first, last):
        saver.check()
        if run.lock is not None:
            run.lock.check()
        started = time.perf_counter()
        reach = iteration + config.rollout.batches_ahead * config.schedule.steps_per_rollout
        while sampled_for <= min(reach, last - 1):
            watchdog.begin(f"rollout for iteration {sampled_for + 1}")
            with phase("sampling", often=True):
                trajectories, routing = sample(run, sampler, sampled_for)
            rewards = run.rewarder.start(trajectories)
            batches += plan_steps(run.learner, trajectories, rewards, routing, sampled_for)
            sampled_for += config.schedule.steps_per_rollout
        sampled = time.perf_counter()
        watchdog.begin(f"optimizer step {iteration + 1}")
        # Dropout of every step has a stream of its own, so that a resumed run draws the same.
        seed_model_parallel(config.seed + 1_000_003 * iteration)
        start_sampling_tokens(run, batches[0])
        metrics = train_step(run.learner, batches)
        batch = batches.popleft()
        metrics |= time_split(run, batch, sampled - started, time.perf_counter() - started) | aside
        aside = {}
        observed = rollout_metrics(batch.trajectories, batch.rewards.collect())
        metrics |= observed

        done = iteration + 1
        for message in alarms_of(run, alarms, iteration, batch, metrics, observed):
            say(f"ALARM: {message}")
            log.alarm(done, message)
        if batch.samples is not None:
            log.samples(done, samples_of(run, batch))
        if done == last or _every(config.schedule.eval_interval, done):
            watchdog.begin(f"evaluation after iteration {done}")
            begun = time.perf_counter()
            if evaluated := evaluation(run):
                metrics |= evaluated | {"time/evaluate": time.perf_counter() - begun}
        log.step(done, metrics)
        # Between two steps of one rollout batch nothing can be saved: its samples are in memory alone.
        # Weights that are not finite are not saved; the guard decides what becomes of the run.
        is_sound = not run.learner.skipped.weights_damaged
        is_between = is_sound and done % config.schedule.steps_per_rollout == 0
        is_asked = is_between and stop.agreed() and done < last
        is_best = is_between and config.checkpoint.save_best and best.is_new(metrics)
        is_due = is_sound and (done == last or _every(config.checkpoint.save_interval, done))
        if is_due or is_asked or is_best:
            watchdog.begin(f"checkpoint of iteration {done}")
            keep = True if is_asked else None  # whoever is asked to stop is to go on later
            best.saved(done, metrics)
            begun = time.perf_counter()
            with phase(f"saving iteration {done}", often=True):
                save(run.learner, done, run.tokenizer, alarms, with_optimizer=keep, writer=saver)
            aside["time/save"] = time.perf_counter() - begun
        if is_asked:
            saver.wait()
            run.lifeline.release()
            raise Preempted(done)
    watchdog.begin("the last checkpoint")
    saver.wait()
    if run.learner.skipped.weights_damaged:
        raise FloatingPointError(
            "the student's weights are not finite after the last step (see evidence/); the same command "
            "continues from the last checkpoint"
        )
    if first >= last:  # no iterations were asked for: the student as it is
        metrics = evaluation(run)
        if metrics:
            log.step(first, metrics)
    return metrics


def sample(
    run: Run, sampler: PromptSampler, iteration: int
) -> tuple[list[Trajectory], RoutingRecords | None]:
    """The trajectories of the next `steps_per_rollout` iterations, the same list on every rank: the student's
    own, or the data's answers; with routing replay also the experts that their tokens went to.
    """
    config = run.config
    position = run.learner.position
    assert iteration % position.steps_per_rollout == 0, "a rollout batch starts where the last one ended"
    number = position.batch(iteration)
    prompts = sampler.after(position.prompts_before(number), position.prompts_per_rollout)
    seed = config.seed * 1_000_003 + number  # every rollout has its own stream, whatever was drawn before it
    return draw_trajectories(
        run.engine,
        prompts,
        run.learner.objectives,
        config.rollout,
        run.tokenizer,
        run.stop_ids,
        samples_per_prompt=samples_per_prompt(config),
        seed=seed,
        log=open_rollout_log(run.learner, number, prompts, seed),
    )


_MAKE_ROOM = "make room, and the same command continues from the last checkpoint"


def _every(interval: int, iteration: int) -> bool:
    return interval > 0 and iteration % interval == 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; a user's mistake is one line on the terminal and exit status 2. A run that was asked to
    stop and saved has status 75 on every rank.
    """
    parser = argparse.ArgumentParser(prog="megatron_mopd.train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--debug", action="store_true", help="show stack traces of configuration errors")
    parser.add_argument(
        "--allow-teacher-change",
        action="store_true",
        help="resume although teachers are others than those the checkpoint was written with",
    )
    parser.add_argument(
        "--allow-tokenizer-change",
        action="store_true",
        help="go on although a model was trained with another tokenizer or chat template than data.tokenizer",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    if options.allow_teacher_change:
        options.overrides.append("checkpoint.allow_teacher_change=true")
    threading.excepthook = _of_thread
    if options.allow_tokenizer_change:
        options.overrides.append("data.allow_tokenizer_change=true")
    try:
        train(load_config(options.config, options.overrides))
    except Preempted as request:
        say(f"{request} (exit status {PREEMPTED_STATUS})")
        dist.barrier()  # the launcher stops everybody at the first exit
        _leave(PREEMPTED_STATUS)
    except KeyboardInterrupt:  # before the first step: there is nothing to save
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        _leave(INTERRUPTED_STATUS)
    except Exception as error:
        # One rank's failure ends the job: the others wait in a collective until the launcher stops them.
        if isinstance(error, RuntimeError):
            # A collective breaks when a rank dies: the lifeline, which is about to notice, says which one.
            time.sleep(LIFELINE_NOTICES)
        # Nothing of the program's is wrong where a disk is full: like a mistake, that is one line.
        full = disk_problem(error)
        is_mistake = isinstance(error, ConfigError)
        # What the error quotes of files, names and models is shown, and does not act on the terminal.
        is_line = is_mistake or full is not None or isinstance(error, SaveError)
        said = visible(error if full is None else f"{full}; {_MAKE_ROOM}", keep_lines=not is_line)
        message = f"error: {said}" if is_line else f"{type(error).__name__}: {said}"
        if is_first_to_fail(message):
            if options.debug or not is_line:
                print(visible(traceback.format_exc(), keep_lines=True), end="", file=sys.stderr)
            print(message, file=sys.stderr)
        _leave(2 if is_mistake else 1)
    if dist.is_initialized():
        dist.destroy_process_group()


def _of_thread(failure: threading.ExceptHookArgs) -> None:
    """A full disk that a library's thread met (TensorBoard's) is told in one line by whoever waits for it."""
    if disk_problem(failure.exc_value) is None:
        threading.__excepthook__(failure)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
