"""Multi-teacher on-policy distillation, on one page.

    python -m megatron_mopd.train --config FILE.yaml [section.key=value ...]
    torchrun --nproc-per-node N -m megatron_mopd.train --config FILE.yaml [section.key=value ...]

Each iteration the student samples its own trajectories, the teachers of each trajectory's domain score them,
and the student is pulled towards those teachers by reverse KL over the full vocabulary. With
`objective.kind=sft` the trajectories are the data's own answers and there is nothing to score.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence

from megatron_mopd.commands.training import run_command
from megatron_mopd.config import Config
from megatron_mopd.config.objectives import samples_per_prompt
from megatron_mopd.data.prompts import PromptSampler
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.observe.access import closed_to_others
from megatron_mopd.observe.progress import phase, say
from megatron_mopd.rollout.collect import collect_trajectories
from megatron_mopd.rollout.routing_records import RoutingRecords
from megatron_mopd.run.alarms import Alarms
from megatron_mopd.run.checkpointing import check_space, resume, save
from megatron_mopd.run.lifecycle import Lifecycle, close
from megatron_mopd.run.resumable import FinishedRun
from megatron_mopd.run.rollout_logs import open_rollout_log
from megatron_mopd.run.setup import Run, build_run
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import StepBatch, plan_steps


@closed_to_others()
def train(config: Config) -> dict[str, float]:
    """Run training: build, resume, iterate. Returns the last metrics, or none if the run had already
    finished; a finished run is left untouched.

    Raises `Preempted` on every rank if the run was asked to stop and has saved.
    """
    try:
        run = build_run(config)
    except FinishedRun as finished:
        say(str(finished))
        return {}
    with run.lock or contextlib.nullcontext():
        alarms = Alarms()
        first = resume(run.learner, alarms, run.resumable)
        check_space(run.learner)
        with Lifecycle(run, first, alarms) as life:
            metrics = iterate(run, life, alarms)
        close(run)
    return metrics


def iterate(run: Run, life: Lifecycle, alarms: Alarms) -> dict[str, float]:
    """Run the remaining iterations: sample, score and learn, evaluate, save. Returns the last metrics."""
    sampler = PromptSampler(run.prompts, run.config.seed)
    batches: deque[StepBatch] = deque()  # optimizer steps whose samples are available
    metrics: dict[str, float] = {}
    for iteration in life.iterations():
        done = iteration + 1
        for upcoming in life.rollouts_due(iteration):
            trajectories, routing = sample(run, sampler, upcoming)
            rewards = run.rewarder.start(trajectories)
            batches += plan_steps(run.learner, trajectories, rewards, routing, upcoming)

        samples = life.begin_step(batches[0])
        metrics = train_step(run.learner, batches, samples)
        metrics = life.end_step(batches.popleft(), metrics, samples)

        metrics |= life.evaluate(done)
        life.log(done, metrics)
        if life.save_is_due(done, metrics):
            with life.saving(done, metrics) as optimizer:
                save(run.learner, done, run.tokenizer, alarms, with_optimizer=optimizer, writer=life.writer)
        life.stop_if_asked(done)
    return life.finish(metrics)


def sample(
    run: Run, sampler: PromptSampler, iteration: int
) -> tuple[list[Trajectory], RoutingRecords | None]:
    """Sample the trajectories of the next `steps_per_rollout` iterations, the same list on every rank: the
    student's own, with tokens on the ranks that sampled them, or the data's answers. With routing replay,
    also returns the experts their tokens went to.
    """
    position = run.learner.position
    assert iteration % position.steps_per_rollout == 0, "a rollout batch starts where the last one ended"
    number = position.batch(iteration)
    prompts = sampler.after(position.prompts_before(number), position.prompts_per_rollout)
    seed = run.config.seed * 1_000_003 + number  # one random stream per rollout, independent of earlier draws
    with phase("sampling", often=True):
        return collect_trajectories(
            run.engine,
            prompts,
            run.learner.objectives,
            run.config.rollout,
            run.tokenizer,
            run.stop_ids,
            samples_per_prompt=samples_per_prompt(run.config),
            seed=seed,
            log=open_rollout_log(run.learner, number, prompts, seed),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see `commands.training`."""
    run_command(train, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    main()
