"""What a run records about a step besides its losses: where its time went, a few responses, alarms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_mopd.estimate.flops import peak_flops, step_flops, utilization
from megatron_mopd.losses.token_samples import TokenSamples
from megatron_mopd.observe.run_log import device_name
from megatron_mopd.run.alarms import Alarms
from megatron_mopd.run.setup import Run
from megatron_mopd.run.teacher_alarms import first_step_alarms
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.step_batch import StepBatch


def time_split(
    run: Run, batch: StepBatch, metrics: dict[str, float], rollout: float, total: float
) -> dict[str, float]:
    """Where a step's time went on this rank, and its throughput."""
    lengths = [t.response_length for t in batch.trajectories]
    busy = metrics["time/score"] + metrics["time/train"]
    peak = peak_flops(device_name(run.groups.device), run.config.params_dtype)
    return {
        "time/rollout": rollout,
        "time/other": max(0.0, total - rollout - busy),
        **utilization(_flops(run.learner, batch), busy, run.groups.world_size, peak),
        "tokens_per_second": sum(map(len, batch.trajectories)) / total,
        "response_length": sum(lengths) / max(1, len(lengths)),
    }


def _flops(learner: Learner, batch: StepBatch) -> float:
    """FLOPs of this step's scoring and learning; scoring done ahead counts in the step that uses it."""
    student, teachers = learner.forward_costs
    return step_flops(batch.trajectories, student, teachers, lambda domain: batch.targets[domain].mixture)


def alarms_of(
    run: Run, alarms: Alarms, batch: StepBatch, metrics: dict[str, float], observed: dict[str, float]
) -> list[str]:
    """The alarms of a step: about its rollouts, its losses, and in the first step its teachers."""
    messages = alarms.rollout(batch.trajectories, batch.rewards.collect(), observed)
    skipped = run.learner.skipped
    if skipped.in_a_row:
        message = (
            f"step {batch.iteration + 1} was skipped: its loss or a gradient is not finite (see evidence/)"
        )
        return [*messages, message + "".join(f"; {cause}" for cause in skipped.causes[:1])]
    messages += alarms.step(metrics)
    if batch.iteration == 0 and run.learner.routing is not None:
        messages += first_step_alarms(metrics, run.learner.routing, run.config.teachers)
    return messages


def token_samples(run: Run, batch: StepBatch) -> TokenSamples | None:
    """The collector of every token's divergence in a few responses, if the coming step is one of those that
    `log.sample_interval` selects: the first, the last, and every n-th."""
    log, done = run.config.log, batch.iteration + 1
    if run.learner.routing is None or not log.sample_interval or not log.samples_per_domain:
        return None
    if done in (1, run.config.schedule.train_iters) or done % log.sample_interval == 0:
        return TokenSamples(batch.trajectories, log.samples_per_domain, run.groups)
    return None


def sample_lines(run: Run, batch: StepBatch, samples: TokenSamples) -> Iterator[dict[str, Any]]:
    """The step's samples for the report: responses with per-token divergence, teachers and reward."""
    rewards = batch.rewards.collect()
    for index, entry in samples.lines(run.tokenizer):
        mixture = batch.targets[entry["domain"]].mixture
        yield entry | {"teachers": dict(mixture), "reward": rewards.get(index)}
