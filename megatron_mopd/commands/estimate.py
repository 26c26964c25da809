"""Estimate a run's memory before launch, per GPU and per host, by component.

    python tools/estimate.py --config FILE.yaml [--world-size N] [--ranks-per-host 8] [section.key=value ...]
    torchrun --nproc-per-node N tools/estimate.py --check --config FILE.yaml [section.key=value ...]

The first form needs no GPU, no second process and no weights; checkpoints only need their model descriptions.
`--check` also builds the run, trains one step on responses of full length, and prints the allocated next to
the estimated memory for every stage; it exits with status 1 if a component of any rank differs by more than
10%.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import warnings
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_mopd.backend.messages import visible
from megatron_mopd.backend.parallel import end_ranks, fewest_ranks, select_device
from megatron_mopd.config import Config, ConfigError, DomainObjectives, load_config
from megatron_mopd.config.objectives import needs_teachers
from megatron_mopd.data.tokenizer import load_tokenizer
from megatron_mopd.estimate.measured_memory import longest_trajectories, measure
from megatron_mopd.estimate.memory import RankMemory, estimate_rank, imagined_groups
from megatron_mopd.run.inputs import resolve_student, resolve_teachers
from megatron_mopd.run.setup import build_run
from megatron_mopd.training.teacher_blocks import with_block_size


def estimate(
    config: Config, world_size: int, ranks: list[int], ranks_per_host: int | None = None
) -> dict[int, RankMemory]:
    """Memory of the given ranks in a world of `world_size`, on one host unless `ranks_per_host` is given."""
    select_device("cpu")
    tokenizer = load_tokenizer(config.data.tokenizer)
    student = resolve_student(config, tokenizer)
    objectives = DomainObjectives(config.objective)
    teachers, mixture = [], 1
    if any(needs_teachers(objective) for objective in objectives.all()):
        teachers, routing = resolve_teachers(config, student, tokenizer)
        mixture = routing.max_teachers
    parallel, result = with_block_size(config, student, world_size, ranks_per_host), {}
    for rank in ranks:
        with imagined_groups(parallel, world_size, rank) as groups:
            result[rank] = estimate_rank(config, student, teachers, mixture, groups)
    return result


def stage_ranks(config: Config, world_size: int) -> list[int]:
    """The first rank of every pipeline stage; all ranks of a stage need the same memory."""
    stages = config.parallel.pipeline_model_parallel_size
    return [stage * (world_size // stages) for stage in range(stages)]


def show(config: Config, world_size: int, ranks_per_host: int) -> None:
    ranks = stage_ranks(config, world_size)
    memory = estimate(config, world_size, ranks, ranks_per_host)
    components = list(dict.fromkeys(name for item in memory.values() for name in item.device))
    print(f"per GPU, GiB ({world_size} ranks)")
    heads = "".join(f"{f'stage {stage}':>12}" for stage in range(len(ranks)))
    print(f"{'':20}{heads}")
    for name in components:
        print(f"{name:20}" + "".join(f"{_gib(memory[rank].device.get(name, 0)):12.3f}" for rank in ranks))
    print(f"{'total':20}" + "".join(f"{_gib(sum(memory[rank].device.values())):12.3f}" for rank in ranks))
    print(f"per host of {ranks_per_host} ranks, GiB: the host that needs the most")
    largest = fullest_host(memory, world_size, ranks_per_host)
    for name, size in largest.items():
        print(f"{name:20}{_gib(size):12.3f}")
    print(f"{'total':20}{_gib(sum(largest.values())):12.3f}")
    if disk := max(item.disk for item in memory.values()):
        print(f"files per rank      {_gib(disk):12.3f}")


def fullest_host(memory: dict[int, RankMemory], world_size: int, ranks_per_host: int) -> dict[str, int]:
    """Bytes by component on the host that needs the most, from one rank of every pipeline stage."""
    firsts = sorted(memory)
    per_stage = world_size // len(firsts)
    totals = []
    for first in range(0, world_size, ranks_per_host):
        last = min(world_size, first + ranks_per_host)
        here = [memory[firsts[rank // per_stage]] for rank in range(first, last)]
        names = list(dict.fromkeys(name for item in here for name in item.host))
        totals.append({name: sum(item.host.get(name, 0) for item in here) for name in names})
    return max(totals, key=lambda sizes: sum(sizes.values()))


def _gib(size: int) -> float:
    return size / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--world-size", type=int, default=None, help="ranks of the run; default: the minimum")
    parser.add_argument("--ranks-per-host", type=int, default=8, help="GPUs per host")
    parser.add_argument("--check", action="store_true", help="compare with one real step on this machine")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    try:
        config = load_config(options.config, options.overrides)
        if options.check:
            sys.exit(check(config))
        show(config, options.world_size or fewest_ranks(config.parallel), options.ranks_per_host)
    except ConfigError as error:
        print(f"error: {visible(error)}", file=sys.stderr)
        sys.exit(2)


def estimate_apart(
    config: Config, world_size: int, ranks: list[int], ranks_per_host: int | None = None
) -> dict[int, RankMemory]:
    """`estimate` in a separate process, for a caller that starts real ranks later: the imagined world and the
    CPU backend end with that process. Must be called before CUDA is used. Raises `ConfigError` like
    `estimate`.
    """
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_answer, args=(queue, config, world_size, ranks, ranks_per_host))
    child.start()
    answer = queue.get()
    child.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(queue, config: Config, world_size: int, ranks: list[int], ranks_per_host: int | None) -> None:
    try:
        queue.put(estimate(config, world_size, ranks, ranks_per_host))
    except Exception as error:  # reported by the parent
        queue.put(error if isinstance(error, ConfigError) else RuntimeError(repr(error)))


def check(config: Config) -> int:
    """Run one real step on all ranks, print estimated and allocated bytes of every component of every stage,
    and return the exit status."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not torch.cuda.is_available():
        config = replace(config, device="cpu")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None
    expected = estimate_apart(config, world_size, [rank], local)[rank]
    # The run's progress does not affect the memory of its next step.
    run = build_run(replace(config, checkpoint=replace(config.checkpoint, resume=False)))
    trajectories = longest_trajectories(run.config, list(run.prompts), run.tokenizer.vocab_size)
    found = measure(run.learner, trajectories)
    run.rewarder.close()
    if run.lock is not None:
        run.lock.release()
    sizes = expected.device | expected.host | ({"teacher files": expected.disk} if expected.disk else {})
    rows: list[list[tuple[str, int, int]]] = [[] for _ in range(world_size)]
    dist.all_gather_object(rows, [(name, size, found.get(name, 0)) for name, size in sizes.items()])
    status, shown = 0, None
    for number, compared in enumerate(rows):
        status |= any(not is_close(size, real) for _, size, real in compared)
        if rank == 0 and compared != shown:  # ranks of a stage are often the same
            shown = compared
            print(f"{f'bytes on rank {number}':24}{'estimated':>14}{'allocated':>14}{'ratio':>8}")
            for name, size, real in compared:
                ratio = size / real if real else float(size > 0)
                print(f"{name:24}{size:14d}{real:14d}{ratio:8.3f}{'' if is_close(size, real) else '  OFF'}")
    sys.stdout.flush()
    end_ranks(run.lifeline)
    return status


def is_close(estimated: int, allocated: int) -> bool:
    """Whether an estimate is within 10% of the allocated size."""
    return abs(estimated - allocated) <= 0.1 * allocated


if __name__ == "__main__":
    main()
