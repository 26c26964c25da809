"""A step with micro-batches of the length they have, beside one with micro-batches of the whole token budget.

    torchrun --nproc-per-node 4 -m benchmarks.micro_batch_lengths [--steps 8]

Two pipeline stages times two data-parallel ranks, four teachers, packed trajectories of log-normal lengths.
"Whole budget" is what a pipeline does whose stages exchange messages of one shape: trajectories are dealt by
number, packed in order, and every micro-batch is padded to the budget. Both kinds of step run in turn on the
same trajectories, so that other load on the machine affects both; times are medians, counts are exact.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
import warnings
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from benchmarks.teacher_scaling import VOCAB, learner
from megatron_mopd.backend.parallel import build_parallel_groups, select_device, start_ranks
from megatron_mopd.config import Config, config_from_dict
from megatron_mopd.data.batching import BatchShape
from megatron_mopd.data.division import Division
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.training import step_batch
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.step import train_step

TEACHERS, SAMPLES, BUDGET, STAGES = 4, 64, 1024, 2


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


def trajectories(seed: int) -> list[Trajectory]:
    """Log-normal lengths, median 150 tokens, at most the budget; a quarter of each is prompt."""
    rng = random.Random(seed)
    result = []
    for index in range(SAMPLES):
        length = min(BUDGET, 16 + int(rng.lognormvariate(math.log(150), 0.9)))
        ids = [rng.randrange(VOCAB) for _ in range(length)]
        prompt = Prompt(
            "", tuple(ids[: length // 4]), f"domain{index % TEACHERS:02d}", None, "-", None, index, ""
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


def computed(step: step_batch.StepBatch) -> tuple[int, int]:
    """Tokens that a rank computes for the student and for the teachers."""
    return sum(step.sizes), sum(sum(task.sizes) for task in step.scoring)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each kind")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    device = select_device("auto")
    start_ranks(device, 10)
    with tempfile.TemporaryDirectory() as directory:
        config = configuration(directory)
        groups = build_parallel_groups(config.parallel, device, seed=1)
        item = learner(config, groups, TEACHERS, Path(directory), sequence_length=BUDGET)
        times: dict[bool, list[float]] = {False: [], True: []}
        tokens = {False: [0, 0], True: [0, 0]}
        needed = 0
        for number in range(options.steps + 2):
            batch = trajectories(number)
            for whole_budget in (True, False):
                step = plan(item, batch, whole_budget)
                dist.barrier()
                started = time.perf_counter()
                train_step(item, [step])
                if number >= 2:  # the first steps build tables and caches
                    times[whole_budget].append(time.perf_counter() - started)
                    tokens[whole_budget] = [a + b for a, b in zip(tokens[whole_budget], computed(step))]
            needed += sum(map(len, batch)) if number >= 2 else 0
        if dist.get_rank() == 0:
            print(
                f"{dist.get_world_size()} ranks, {STAGES} stages, {options.steps} steps of {SAMPLES} samples"
            )
            print("micro-batches     computed / needed: student  teachers   step (s)")
            for whole_budget, name in ((True, "whole budget"), (False, "own length")):
                student, teachers = (groups.dp_size * count / needed for count in tokens[whole_budget])
                seconds = statistics.median(times[whole_budget])
                print(f"{name:16}  {student:26.2f}  {teachers:8.2f}  {seconds:9.3f}")
            ratio = statistics.median(a / b for a, b in zip(times[False], times[True]))
            print(f"own length / whole budget: {ratio:.2f}", flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
