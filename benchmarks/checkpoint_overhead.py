"""The overhead of saving: the same steps with and without a checkpoint written in the background.

    python benchmarks/checkpoint_overhead.py [--interval 50] [--repeats 40]      # about seven minutes
    torchrun --nproc-per-node 2 benchmarks/checkpoint_overhead.py parallel.expert_model_parallel_size=2

Short windows of optimizer steps alternate in one process, on one model: one kind begins with a save (weights
and optimizer state, checksums, atomic rename) and ends when the checkpoint is complete, the other saves
nothing. A save affects nothing outside its window, so the difference of a pair is the cost of one save; the
median over all pairs, divided by the time of `--interval` steps, is its share of a run. Windows as long as
the interval would instead measure the machine's noise of several percent. A synchronous save is measured for
comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from trainer_overhead import make_batch, make_learner, timed

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.backend.host_memory import long_lived_objects
from megatron_mopd.model.background_save import CheckpointWriter
from megatron_mopd.observe.progress import progress
from megatron_mopd.run.checkpointing import save
from megatron_mopd.run.resumable import checkpoints_directory
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step


class NoTokenizer:
    """The benchmark's model reads made-up tokens."""

    def fingerprint(self) -> str:
        return "none"

    def save(self, directory: Path) -> None:
        directory.mkdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("sft", "full_vocab_kl"), default="full_vocab_kl")
    parser.add_argument("--batch", type=int, default=16, help="trajectories per step")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--interval", type=int, default=50, help="steps from one checkpoint to the next")
    parser.add_argument("--window", type=int, default=3, help="steps in a window; a save must fit into them")
    parser.add_argument("--repeats", type=int, default=40, help="pairs of windows")
    parser.add_argument("--schedule", default="bubble_fill", help="schedule.kind")
    parser.add_argument("--directory", help="where checkpoints go; default: a temporary directory")
    parser.add_argument("layout", nargs="*", help="for example parallel.expert_model_parallel_size=2")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    learner = make_learner(arguments)
    directory = [arguments.directory or tempfile.mkdtemp(prefix="checkpoint_overhead_")]
    dist.broadcast_object_list(directory, src=0)
    learner.config = dataclasses.replace(learner.config, run_dir=directory[0])
    try:
        with long_lived_objects():  # as in `megatron_mopd.train`
            measure(arguments, learner)
    finally:
        if arguments.directory is None and dist.get_rank() == 0:
            shutil.rmtree(directory[0], ignore_errors=True)
    dist.destroy_process_group()


def measure(arguments: argparse.Namespace, learner) -> None:
    trajectories, writer, iterations = make_batch(arguments.batch), CheckpointWriter(), iter(range(10**9))
    begun: list[float] = []  # seconds that training waited when a save began
    ended: list[float] = []  # and at the end of its window, for an incomplete save

    def steps() -> None:
        for _ in range(arguments.window):
            train_step(learner, [plan_step(learner, trajectories)])

    def with_save() -> None:
        started = time.perf_counter()
        save(learner, next(iterations), NoTokenizer(), writer=writer)
        begun.append(time.perf_counter() - started)
        steps()
        started = time.perf_counter()
        writer.wait()
        ended.append(time.perf_counter() - started)

    def waited_for() -> None:
        save(learner, next(iterations), NoTokenizer())

    steps()
    for _ in range(3):  # the first steps plan
        save(learner, next(iterations), NoTokenizer(), writer=writer)
        writer.wait()
        remove(learner)
    seconds: dict[str, list[float]] = {"saving": [], "not saving": [], "waiting": []}
    for pair in progress(range(arguments.repeats), "pairs of windows"):
        windows = [("saving", with_save), ("not saving", steps)]
        for name, window in windows if pair % 2 else reversed(windows):
            seconds[name].append(timed(window, learner.groups.device))
            remove(learner)
        if pair % 4 == 0:
            seconds["waiting"].append(timed(waited_for, learner.groups.device))
            remove(learner)
    size = torch.tensor([float(writer.nbytes)], dtype=torch.float64, device=learner.groups.device)
    dist.all_reduce(size)
    if dist.get_rank() == 0:
        report(arguments, seconds, begun, ended, size.item())


def remove(learner) -> None:
    """Collective: no rank continues before the checkpoints are removed."""
    if dist.get_rank() == 0:
        shutil.rmtree(checkpoints_directory(learner.config.run_dir), ignore_errors=True)
    dist.barrier()


def report(
    arguments: argparse.Namespace,
    seconds: dict[str, list[float]],
    begun: list[float],
    ended: list[float],
    size: float,
) -> None:
    costs = sorted(a - b for a, b in zip(seconds["saving"], seconds["not saving"]))
    step = statistics.median(seconds["not saving"]) / arguments.window
    interval = arguments.interval * step
    # The interval of order statistics that contains the median with 95% confidence.
    margin = round(0.98 * len(costs) ** 0.5)
    low, high = costs[max(0, len(costs) // 2 - margin)], costs[min(len(costs) - 1, len(costs) // 2 + margin)]
    cost, waiting = statistics.median(costs), statistics.median(seconds["waiting"])
    print(
        f"{arguments.kind}, {dist.get_world_size()} ranks, {' '.join(arguments.layout) or 'data parallel'}: "
        f"a checkpoint of {size / 1e6:.1f} MB every {arguments.interval} steps of {step:.3f} s; "
        f"{len(costs)} pairs of windows"
    )
    print(
        f"  training waits when a save begins: median {statistics.median(begun):.3f} s, max {max(begun):.3f}"
    )
    print(f"  and for its end after {arguments.window} steps: median {statistics.median(ended):.3f} s")
    print(f"  a save costs training {cost:.3f} s (95% interval of the median: {low:.3f} to {high:.3f})")
    print(
        f"  saving / not saving: {1 + cost / interval:.4f} ({1 + low / interval:.4f} to "
        f"{1 + high / interval:.4f}); target at most 1.02"
    )
    print(f"  a synchronous save: {waiting:.3f} s, {1 + waiting / interval:.4f}")
    print(f"  shortest interval within 1.02: {max(1, round(cost / 0.02 / step))} steps")


if __name__ == "__main__":
    main()
