"""Multi-teacher on-policy distillation, on one page.

    python -m megatron_mopd.train --config FILE.yaml [section.key=value ...]
    torchrun --nproc-per-node N -m megatron_mopd.train --config FILE.yaml [section.key=value ...]

Each iteration the student samples its own trajectories, the teachers of each trajectory's domain score them,
and the student is pulled towards those teachers by reverse KL over the full vocabulary. With
`objective.kind=sft` the trajectories are the data's own answers and there is nothing to score.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence

import torch.distributed as dist

from megatron_mopd.backend.failure import is_first_to_fail
from megatron_mopd.config import Config, ConfigError, load_config, save_config
from megatron_mopd.config.objectives import samples_per_prompt
from megatron_mopd.data.prompts import PromptSampler
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.observe.metrics import MetricsWriter
from megatron_mopd.observe.progress import StepLine, say
from megatron_mopd.observe.report import draw_report
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.rollout.routing import RoutingRecords
from megatron_mopd.training.checkpoint import resume, save
from megatron_mopd.training.evaluate import evaluate
from megatron_mopd.training.guards import first_step_alarms
from megatron_mopd.training.monitors import Alarms, rollout_metrics
from megatron_mopd.training.sampling import draw_trajectories
from megatron_mopd.training.setup import Run, build_run, run_directory
from megatron_mopd.training.step import StepBatch, plan_steps, train_step


def train(config: Config) -> dict[str, float]:
    """The whole run: build, then for each iteration sample -> score -> learn -> save. Returns the last
    metrics.
    """
    run = build_run(config)
    first = resume(run.learner)
    if run.groups.rank == 0:
        save_config(config, run_directory(config) / "config.yaml")
    writer = MetricsWriter(config.run_dir, config.log.tensorboard, resumed_iteration=first or None)
    line = StepLine(config.schedule.train_iters, first_iteration=first)
    sampler = PromptSampler(run.prompts, config.seed)

    alarms = Alarms()
    metrics: dict[str, float] = {}
    batches: deque[StepBatch] = deque()  # optimizer steps whose samples are there
    sampled_for = first
    for iteration in range(first, config.schedule.train_iters):
        started = time.perf_counter()
        reach = iteration + config.rollout.batches_ahead * config.schedule.steps_per_rollout
        while sampled_for <= min(reach, config.schedule.train_iters - 1):
            trajectories, routing = sample(run, sampler, sampled_for)
            rewards = run.rewarder.start(trajectories)
            batches += plan_steps(run.learner, trajectories, rewards, routing, sampled_for)
            sampled_for += config.schedule.steps_per_rollout
        sampled = time.perf_counter()
        metrics = train_step(run.learner, batches)
        batch = batches.popleft()
        metrics |= _timing(batch, sampled - started, time.perf_counter() - started)
        observed = rollout_metrics(batch.trajectories, batch.rewards.collect())
        metrics |= observed

        done = iteration + 1
        messages = alarms.rollout(batch.trajectories, batch.rewards.collect(), observed) + alarms.step(
            metrics
        )
        if iteration == 0 and run.learner.routing is not None:
            messages += first_step_alarms(metrics, run.learner.routing, config.teachers)
        for message in messages:
            say(f"ALARM: {message}")
        if done == config.schedule.train_iters or _every(config.schedule.eval_interval, done):
            metrics |= evaluation(run)
        writer.log(done, metrics)
        if done == config.schedule.train_iters or _every(config.log.log_interval, done):
            line.show(done, metrics)
        if done == config.schedule.train_iters or _every(config.checkpoint.save_interval, done):
            save(run.learner, done, run.tokenizer)

    if first >= config.schedule.train_iters:
        metrics = evaluation(run)
        writer.log(first, metrics)
    writer.close()
    run.rewarder.close()
    if config.log.report:
        if run.learner.pipeline is not None:
            run.learner.pipeline.draw(run_directory(config), config.schedule.steps_per_rollout)
        if run.groups.rank == 0:
            draw_report(config.run_dir)
    return metrics


def sample(
    run: Run, sampler: PromptSampler, iteration: int
) -> tuple[list[Trajectory], RoutingRecords | None]:
    """The trajectories of the next `steps_per_rollout` iterations, the same list on every rank: the student's
    own, or the data's answers; with routing replay also the experts that their tokens went to.
    """
    config = run.config
    number, rest = divmod(iteration, config.schedule.steps_per_rollout)
    assert rest == 0, "a rollout batch starts where the last one ended"
    size = config.schedule.steps_per_rollout * config.schedule.global_batch_size
    return draw_trajectories(
        run.engine,
        sampler.batch(number, size // samples_per_prompt(config)),
        run.learner.objectives,
        config.rollout,
        run.tokenizer,
        samples_per_prompt=samples_per_prompt(config),
        # Every rollout draws from its own stream, whatever was drawn before it.
        seed=config.seed * 1_000_003 + number,
    )


def evaluation(run: Run) -> dict[str, float]:
    """Greedy accuracy on the held-out prompts, per domain."""
    if run.eval_prompts is None:
        return {}
    sampling = SamplingParams(
        max_new_tokens=run.config.rollout.max_new_tokens,
        temperature=0.0,
        stop_token_ids=SamplingParams.from_config(run.config.rollout, run.tokenizer.eos_id).stop_token_ids,
    )
    prompts = list(run.eval_prompts)
    return evaluate(run.engine, prompts, run.tokenizer, sampling, run.groups, seed=run.config.seed)


def _timing(batch: StepBatch, rollout: float, total: float) -> dict[str, float]:
    lengths = [len(t.response_ids) for t in batch.trajectories]
    return {
        "time/rollout": rollout,
        **{f"time/{name}": value for name, value in batch.seconds.items()},
        "tokens_per_second": sum(map(len, batch.trajectories)) / total,
        "response_length": sum(lengths) / max(1, len(lengths)),
    }


def _every(interval: int, iteration: int) -> bool:
    return interval > 0 and iteration % interval == 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; a user's mistake is one line on the terminal and exit status 2."""
    parser = argparse.ArgumentParser(prog="megatron_mopd.train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--debug", action="store_true", help="show stack traces of configuration errors")
    parser.add_argument(
        "--allow-teacher-change",
        action="store_true",
        help="resume although teachers are others than those the checkpoint was written with",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    if options.allow_teacher_change:
        options.overrides.append("checkpoint.allow_teacher_change=true")
    try:
        train(load_config(options.config, options.overrides))
    except Exception as error:
        # One rank's failure ends the job: the others wait in a collective until the launcher stops them.
        is_mistake = isinstance(error, ConfigError)
        message = f"error: {error}" if is_mistake else f"{type(error).__name__}: {error}"
        if is_first_to_fail(message):
            if options.debug or not is_mistake:
                traceback.print_exc()
            print(message, file=sys.stderr)
        _leave(2 if is_mistake else 1)
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
