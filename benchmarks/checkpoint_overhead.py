"""What saving costs training: the same steps with and without checkpoints written beside them.

    python benchmarks/checkpoint_overhead.py [--interval 50] [--repeats 5]      # about nine minutes
    torchrun --nproc-per-node 2 benchmarks/checkpoint_overhead.py parallel.expert_model_parallel_size=2

Windows of `--interval` optimizer steps alternate in one process, on one model: one kind begins with a save
(weights and optimizer state, checksums, atomic rename) and ends when the checkpoint is complete, the other
saves nothing. The ratio of each pair of windows is taken and the median of the ratios printed; the target is
at most 1.02. Beside it, what a save that training waits for would have cost.
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

from megatron_mopd.model.background_save import CheckpointWriter
from megatron_mopd.observe.progress import progress
from megatron_mopd.training.checkpoint import checkpoints_directory, save
from megatron_mopd.training.step import plan_step, train_step


class NoTokenizer:
    """The model of the benchmark reads made-up tokens."""

    def fingerprint(self) -> str:
        return "none"

    def save(self, directory: Path) -> None:
        directory.mkdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("sft", "full_vocab_kl"), default="full_vocab_kl")
    parser.add_argument("--batch", type=int, default=16, help="trajectories a step")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--interval", type=int, default=50, help="steps from one checkpoint to the next")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of windows")
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
        measure(arguments, learner)
    finally:
        if arguments.directory is None and dist.get_rank() == 0:
            shutil.rmtree(directory[0], ignore_errors=True)
    dist.destroy_process_group()


def measure(arguments: argparse.Namespace, learner) -> None:
    trajectories, writer, iterations = make_batch(arguments.batch), CheckpointWriter(), iter(range(10**9))
    begun: list[float] = []  # seconds that training waited for each save

    def steps() -> None:
        for _ in range(arguments.interval):
            train_step(learner, [plan_step(learner, trajectories)])

    def with_save() -> None:
        started = time.perf_counter()
        save(learner, next(iterations), NoTokenizer(), writer=writer)
        begun.append(time.perf_counter() - started)
        steps()
        writer.wait()

    def waited_for() -> None:
        save(learner, next(iterations), NoTokenizer())

    train_step(learner, [plan_step(learner, trajectories)])
    for _ in range(3):  # the first ones plan
        save(learner, next(iterations), NoTokenizer(), writer=writer)
        writer.wait()
        remove(learner)
    seconds: dict[str, list[float]] = {"saving": [], "not saving": [], "waiting": []}
    for pair in progress(range(arguments.repeats), "pairs of windows"):
        windows = [("saving", with_save), ("not saving", steps)]
        for name, window in windows if pair % 2 else reversed(windows):
            seconds[name].append(timed(window, learner.groups.device))
            remove(learner)
        seconds["waiting"].append(timed(waited_for, learner.groups.device))
        remove(learner)
    size = torch.tensor([float(writer.nbytes)], dtype=torch.float64, device=learner.groups.device)
    dist.all_reduce(size)
    if dist.get_rank() == 0:
        report(arguments, seconds, begun, size.item())


def remove(learner) -> None:
    """Collective: nobody goes on before the checkpoints are gone."""
    if dist.get_rank() == 0:
        shutil.rmtree(checkpoints_directory(learner.config.run_dir), ignore_errors=True)
    dist.barrier()


def report(
    arguments: argparse.Namespace, seconds: dict[str, list[float]], begun: list[float], size: float
) -> None:
    ratios = [a / b for a, b in zip(seconds["saving"], seconds["not saving"])]
    plain = statistics.median(seconds["not saving"])
    waiting = statistics.median(seconds["waiting"])
    print(
        f"{arguments.kind}, {dist.get_world_size()} ranks, {' '.join(arguments.layout) or 'data parallel'}: "
        f"a checkpoint of {size / 1e6:.1f} MB every {arguments.interval} steps, {arguments.repeats} pairs of "
        "windows"
    )
    print(f"  a step without saving: median {plain / arguments.interval:.4f} s")
    print(f"  training waits at a save: median {statistics.median(begun):.3f} s, most {max(begun):.3f} s")
    print(
        f"  saving / not saving: median {statistics.median(ratios):.4f}, from {min(ratios):.4f} to "
        f"{max(ratios):.4f}; target at most 1.02"
    )
    print(f"  a save that training waits for: {waiting:.3f} s, a ratio of {1 + waiting / plain:.4f}")


if __name__ == "__main__":
    main()
