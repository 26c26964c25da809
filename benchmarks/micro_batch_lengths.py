"""A step with micro-batches of the length they have, beside one with micro-batches of the whole token budget.

    torchrun --nproc-per-node 4 -m benchmarks.micro_batch_lengths [--teachers 4 12] [--steps 8]

Two pipeline stages times two data-parallel ranks; trajectories of log-normal lengths, packed. "Whole budget"
is what a pipeline does whose stages exchange messages of one shape: the trajectories of every teacher are
dealt to all ranks, packed in order, and every micro-batch is padded to the budget. Both kinds of step run in
turn on the same trajectories, so that other load on the machine affects both; times are medians, counts are
exact.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from benchmarks.teacher_scaling import VOCAB, learner
from megatron_mopd.backend.parallel import ParallelGroups, build_parallel_groups, select_device, start_ranks
from megatron_mopd.config import Config, config_from_dict
from megatron_mopd.data.batching import BatchShape
from megatron_mopd.data.division import Division
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.training import step_batch
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.step import train_step

SAMPLES, BUDGET, STAGES = 64, 1024, 2


class WholeBudget(BatchShape):
    """Every micro-batch is as long as the token budget."""

    def rows_and_length(self, trajectories):
        return 1, self.max_tokens


class DealtAndPacked(Division):
    """Equal numbers of trajectories on every rank, packed in order."""

    def _packed(self, groups):
        return self._deal(groups)

    def _joined(self, rows):
        ranks = []
        for shares in zip(*rows):
            parts: list[list[Trajectory]] = [[]]
            for trajectory in (t for share in shares for t in share):
                if self._length([*parts[-1], trajectory]) > self._shape.max_tokens:
                    parts.append([])
                parts[-1].append(trajectory)
            ranks.append(parts)
        return [list(row) for row in zip_longest(*ranks, fillvalue=())]


def configuration(directory: str) -> Config:
    return config_from_dict(
        {
            "run_dir": directory,
            "parallel": {"pipeline_model_parallel_size": STAGES},
            "schedule": {"global_batch_size": SAMPLES, "max_tokens_per_micro_batch": BUDGET},
            "optimizer": {"use_distributed_optimizer": False},
        }
    )


def trajectories(seed: int, domains: int) -> list[Trajectory]:
    """Log-normal lengths, median 150 tokens, at most the budget; a quarter of each is prompt."""
    rng = random.Random(seed)
    result = []
    for index in range(SAMPLES):
        length = min(BUDGET, 16 + int(rng.lognormvariate(math.log(150), 0.9)))
        ids = [rng.randrange(VOCAB) for _ in range(length)]
        prompt = Prompt(
            "", tuple(ids[: length // 4]), f"domain{index % domains:02d}", None, "-", None, index, ""
        )
        response = tuple(ids[length // 4 :])
        result.append(Trajectory(prompt, response, index, logprobs=(-8.0,) * len(response)))
    return result


def plan(item: Learner, batch: list[Trajectory], whole_budget: bool) -> step_batch.StepBatch:
    """The step's micro-batches, with the product's division or the other one."""
    if not whole_budget:
        return step_batch.plan_step(item, batch)
    division, for_batch = step_batch.Division, BatchShape.for_batch
    step_batch.Division = DealtAndPacked
    step_batch.BatchShape.for_batch = lambda *a, **k: WholeBudget(**vars(for_batch(*a, **k)))
    try:
        return step_batch.plan_step(item, batch)
    finally:
        step_batch.Division, step_batch.BatchShape.for_batch = division, for_batch


def computed(step: step_batch.StepBatch) -> torch.Tensor:
    """Tokens that all ranks of a stage compute for the student and for the teachers."""
    counts = torch.tensor([sum(step.sizes), sum(sum(task.sizes) for task in step.scoring)])
    dist.all_reduce(counts)
    return counts // STAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", type=int, nargs="+", default=[4, 12], help="numbers of teachers")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each kind")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    device = select_device("auto")
    start_ranks(device, 10)
    with tempfile.TemporaryDirectory() as directory:
        config = configuration(directory)
        groups = build_parallel_groups(config.parallel, device, seed=1)
        if dist.get_rank() == 0:
            print(
                f"{dist.get_world_size()} ranks, {STAGES} stages, {options.steps} steps of {SAMPLES} samples"
            )
            print("teachers  micro-batches  computed / needed: student  teachers  step (s)")
        for teachers in options.teachers:
            compare(config, groups, teachers, options.steps, Path(directory) / f"{teachers}")
        dist.barrier()
    dist.destroy_process_group()


def compare(config: Config, groups: ParallelGroups, teachers: int, steps: int, directory: Path) -> None:
    """Print one row for each kind of step, and the ratio of their times."""
    everyone = replace(groups, config=replace(config.parallel, teacher_block_size=groups.dp_size))
    learners = {
        whole_budget: learner(config, each, teachers, directory, sequence_length=BUDGET)
        for whole_budget, each in ((True, everyone), (False, groups))
    }
    times: dict[bool, list[float]] = {False: [], True: []}
    tokens = {False: torch.zeros(2), True: torch.zeros(2)}
    needed = 0
    for number in range(steps + 2):
        batch = trajectories(number, teachers)
        for whole_budget, item in learners.items():
            step = plan(item, batch, whole_budget)
            dist.barrier()
            started = time.perf_counter()
            train_step(item, [step])
            if number >= 2:  # the first steps build tables and caches
                times[whole_budget].append(time.perf_counter() - started)
                tokens[whole_budget] += computed(step)
        needed += sum(map(len, batch)) if number >= 2 else 0
    if dist.get_rank() == 0:
        for whole_budget, name in ((True, "whole budget"), (False, "own length")):
            student, scored = (tokens[whole_budget] / needed).tolist()
            seconds = statistics.median(times[whole_budget])
            print(f"{teachers:8}  {name:13}  {student:26.2f}  {scored:8.2f}  {seconds:8.3f}")
        ratio = statistics.median(a / b for a, b in zip(times[False], times[True]))
        print(f"{teachers:8}  own length / whole budget: {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
