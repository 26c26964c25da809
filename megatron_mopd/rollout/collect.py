"""Collect the trajectories of a rollout batch: sampled by the student, or answers from the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from megatron_mopd.config import DomainObjectives, RolloutConfig
from megatron_mopd.data.arrays import id_array
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.tokenizer import Tokenizer
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.rollout.engine import RolloutEngine, SamplingParams
from megatron_mopd.rollout.routing_records import RoutingRecords
from megatron_mopd.rollout.write_ahead import RolloutLog


def collect_trajectories(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    objectives: DomainObjectives,
    rollout: RolloutConfig,
    tokenizer: Tokenizer,
    stop_ids: Iterable[int],
    *,
    samples_per_prompt: int,
    seed: int,
    log: RolloutLog | None = None,
) -> tuple[list[Trajectory], RoutingRecords | None]:
    """`samples_per_prompt` trajectories for each prompt, the same list on every rank, ordered by index; the
    tokens of sampled ones are on the ranks that sampled them (`RolloutEngine.generate`).

    Prompts of a domain trained with `sft` get their `answer`, repeated so that every prompt has the same
    number of trajectories. Every rank tokenizes all of these answers, because planning needs their lengths:
    that costs it the tokenizer's time and 4 bytes per token of an answer. The index is position of the prompt
    x samples_per_prompt + sample. With routing replay, the expert choices of the sampled trajectories are
    also returned, under the same indices.
    """
    samples = samples_per_prompt
    given = [objectives.of(prompt.domain).kind == "sft" for prompt in prompts]
    asked = [position for position, is_given in enumerate(given) if not is_given]
    trajectories, routing = [], None
    if asked:
        sampling = SamplingParams.from_config(rollout, stop_ids)
        drawn = engine.generate(
            [prompts[position] for position in asked],
            sampling,
            seed=seed,
            samples_per_prompt=samples,
            log=log,
        )
        index_of = {t.index: asked[t.index // samples] * samples + t.index % samples for t in drawn}
        trajectories = [dataclasses.replace(t, index=index_of[t.index]) for t in drawn]
        if engine.routing is not None:
            routing = engine.routing.renumbered(index_of)
    for position, prompt in enumerate(prompts):
        if given[position]:
            response = id_array([*tokenizer.encode(prompt.answer), tokenizer.eos_id])
            trajectories += [Trajectory(prompt, response, position * samples + i) for i in range(samples)]
    return sorted(trajectories, key=lambda trajectory: trajectory.index), routing
