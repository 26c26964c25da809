"""What a run writes down about a step beside its losses: where its time went, a few responses, alarms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_mopd.model.gpt import unwrap
from megatron_mopd.observe.run_log import device_name
from megatron_mopd.training.flops import forward_cost, peak_flops, step_flops, utilization
from megatron_mopd.training.guards import first_step_alarms
from megatron_mopd.training.monitors import Alarms
from megatron_mopd.training.setup import Run
from megatron_mopd.training.step import Learner, StepBatch
from megatron_mopd.training.token_samples import TokenSamples


def time_split(run: Run, batch: StepBatch, rollout: float, total: float) -> dict[str, float]:
    """Where a step's time went on this rank, and what it achieved."""
    lengths = [len(t.response_ids) for t in batch.trajectories]
    learner, busy = run.learner, sum(batch.seconds.values())
    peak = peak_flops(device_name(run.groups.device), run.config.params_dtype)
    return {
        "time/rollout": rollout,
        **{f"time/{name}": value for name, value in batch.seconds.items()},
        "time/other": max(0.0, total - rollout - busy),
        **utilization(_flops(learner, batch), busy, run.groups.world_size, peak),
        "tokens_per_second": sum(map(len, batch.trajectories)) / total,
        "response_length": sum(lengths) / max(1, len(lengths)),
    }


def _flops(learner: Learner, batch: StepBatch) -> float:
    """Of this step's scoring and learning; what was scored ahead of time counts where it is used."""
    vocabulary, bank = learner.model.vocab_size, learner.bank
    return step_flops(
        batch.trajectories,
        forward_cost(unwrap(learner.chunks[0]).config, vocabulary),
        {name: forward_cost(bank.config(name), vocabulary) for name in bank.names} if bank else {},
        lambda domain: learner.mixture(domain, batch.iteration),
    )


def alarms_of(
    run: Run,
    alarms: Alarms,
    iteration: int,
    batch: StepBatch,
    metrics: dict[str, float],
    observed: dict[str, float],
) -> list[str]:
    """What is to be said after a step: of its rollouts, its losses, and at first of its teachers."""
    messages = alarms.rollout(batch.trajectories, batch.rewards.collect(), observed)
    if run.learner.skipped.in_a_row:
        left_out = f"step {iteration + 1} was left out: its loss or a gradient is not finite (see evidence/)"
        return [*messages, left_out + "".join(f"; {cause}" for cause in batch.causes[:1])]
    messages += alarms.step(metrics)
    if iteration == 0 and run.learner.routing is not None:
        messages += first_step_alarms(metrics, run.learner.routing, run.config.teachers)
    return messages


def start_sampling_tokens(run: Run, batch: StepBatch) -> None:
    """Have the coming step keep the divergence of every token of a few responses, if it is one of those that
    `log.sample_interval` names: the first, the last, and every n-th."""
    log, done = run.config.log, batch.iteration + 1
    if run.learner.routing is None or not log.sample_interval or not log.samples_per_domain:
        return
    if done in (1, run.config.schedule.train_iters) or done % log.sample_interval == 0:
        batch.samples = TokenSamples(batch.trajectories, log.samples_per_domain, run.groups.device)


def samples_of(run: Run, batch: StepBatch) -> Iterator[dict[str, Any]]:
    """The step's sample for the report: responses with the divergence of every token, teachers and reward."""
    rewards = batch.rewards.collect()
    for index, entry in batch.samples.lines(run.tokenizer):
        mixture = run.learner.mixture(entry["domain"], batch.iteration)
        yield entry | {"teachers": dict(mixture), "reward": rewards.get(index)}
