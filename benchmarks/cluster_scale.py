"""What teachers cost on 8 to 4,096 data-parallel ranks: real sharing, packing and plans on drawn lengths.

    python -m benchmarks.cluster_scale            # the quick selection: a few minutes on one core
    python -m benchmarks.cluster_scale --full     # every table with more teachers, lengths and batches

Nothing is trained. Batches of random lengths and domains are shared among blocks (`data/blocks.py`), divided
among the ranks of each block (`data/division.py`), planned (`pipeline/plan.py`) and simulated
(`pipeline/simulate.py`) by the code that training uses. Cells are mean/worst over consecutive random batches,
each with its own seed.

The tables' columns:

    block      data-parallel ranks that run in step: EP ranks / (TP x CP), 1 for a dense model
    bound      teacher tokens that whole sequences require / those of the samples: per teacher and block the
               larger of the mean a rank and the longest sequence, on each of its ranks
    computed   teacher tokens computed, padding and waiting ranks included / those that the bound allows
    student    the same for the student, for which the bound is the larger of a rank's mean and the longest
               sequence
    before     teacher tokens computed / needed if every teacher's samples are dealt to all ranks and every
               micro-batch is padded to the budget, which is what blocks replace
    slowest    work of the slowest block / mean work of a block (student and teachers, as computed), and the
               same for teacher tokens alone
    loads      most teachers of a block in a step (the limit, ceil(teachers / blocks) + 1)
    new        share of blocks that see a teacher which they did not see in the batch before
    pipeline   simulated time of a step / bubble-free time of the same micro-batches, steady state with
               look-ahead to the next step, of the first and the middle block
    step       that x work of the slowest block / work that the samples need, spread evenly
    plan       CPU milliseconds of one rank: sharing, dividing its own block, planning its pipeline
    copied     GiB that a GPU loads for teachers in a step
    host       GiB of teachers on a host of 8 GPUs: `host`, and `host_sharded` over the ranks of a block
               (`mmap` needs none)
    rollout    MiB of a rollout batch that a rank receives: its tokens and log-probs, 32 bytes a response
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np

from benchmarks._cluster_cases import (
    FLOPS,
    LOAD_BYTES_PER_SECOND,
    LONGEST,
    Case,
    Sample,
    layout_cases,
    sharing_cases,
)
from megatron_mopd.data.batching import BatchShape
from megatron_mopd.data.blocks import share_among_blocks
from megatron_mopd.data.division import Cut, Division
from megatron_mopd.observe.progress import progress
from megatron_mopd.pipeline.instructions import Plan
from megatron_mopd.pipeline.plan import Planner, bubble_free_time
from megatron_mopd.pipeline.problem import Limits, PlanRequest, ScoringTask
from megatron_mopd.pipeline.simulate import simulate
from megatron_mopd.training.scoring_tasks import scoring_task


@dataclass(frozen=True)
class BlockStep:
    """What one block does in one step."""

    student: Cut
    teachers: dict[str, Cut]
    student_bound: float
    teacher_bound: float

    @property
    def teacher_tokens(self) -> int:
        return sum(sum(cut.sizes) for cut in self.teachers.values())

    @property
    def work(self) -> int:
        """In teacher tokens: a student's forward and backward pass cost three."""
        return 3 * sum(self.student.sizes) + self.teacher_tokens

    def scoring(self) -> tuple[ScoringTask, ...]:
        return tuple(scoring_task(name, cut, self.student) for name, cut in self.teachers.items())


def shared(case: Case, batch: Sequence[Sample]) -> list[list[Sample]]:
    """The batch's shares, as training makes them: a student token costs three times a teacher's."""
    lengths = np.fromiter(map(len, batch), np.float64, len(batch))
    return share_among_blocks(
        batch, case.blocks, [t.domain for t in batch], 4 * lengths, case.block, scoring_costs=lengths
    )


def block_step(case: Case, shape: BatchShape, share: Sequence[Sample]) -> BlockStep:
    """The micro-batches of one block."""
    division = Division(share, case.block, shape, lambda t: t.domain)
    by_domain: dict[str, list[int]] = {}
    for sample in share:
        by_domain.setdefault(sample.domain, []).append(len(sample))
    cuts = {name: division.cut(lambda t, name=name: t.domain == name) for name in sorted(by_domain)}
    lengths = list(map(len, share))
    return BlockStep(
        division.cut(),
        cuts,
        max(sum(lengths) / case.block, max(lengths, default=0)),
        sum(max(sum(found) / case.block, max(found)) for found in by_domain.values()),
    )


def dealt_to_all(case: Case, batch: Sequence[Sample], budget: int) -> float:
    """Teacher tokens computed / needed if each teacher's samples are dealt back and forth to all ranks, and
    packed in order into as many micro-batches of the whole budget as the fullest rank needs."""
    groups: dict[str, list[int]] = {}
    for sample in sorted(batch, key=len, reverse=True):
        groups.setdefault(sample.domain, []).append(len(sample))
    computed = 0
    for lengths in groups.values():
        ranks: list[list[int]] = [[] for _ in range(case.dp)]
        for number, length in enumerate(lengths):
            lap, place = divmod(number, case.dp)
            ranks[place if lap % 2 == 0 else case.dp - 1 - place].append(length)
        computed += case.dp * budget * max(_packed_in_order(rank, budget) for rank in ranks)
    return computed / sum(map(len, batch))


def _packed_in_order(lengths: Sequence[int], budget: int) -> int:
    count, room = 0, 0
    for length in lengths:
        if length > room:
            count, room = count + 1, budget
        room -= length
    return count


def steady_state(case: Case, steps: Sequence[BlockStep], planner: Planner) -> float:
    """Simulated time of a block's steps / their bubble-free time. Each plan looks ahead to the next step; the
    first two steps, and the last, which has none to look ahead to, do not count."""
    plans: list[Plan] = []
    ideal: list[float] = []
    known = steps[0].scoring()
    slots: dict[str, tuple[str, ...]] = {}
    for number, step in enumerate(steps):
        ahead = steps[number + 1].scoring() if number + 1 < len(steps) and case.pp > 1 else ()
        request = PlanRequest(
            case.pp,
            len(step.student.sizes),
            case.costs(),
            sizes=step.student.sizes,
            scoring=known + tuple(replace(task, step=1) for task in ahead),
        )
        ideal.append(bubble_free_time(replace(request, scoring=step.scoring())))
        heads = max(request.head_slots(), len(slots.get("resident_heads", ())))
        plans.append(planner.plan(replace(request, limits=Limits(resident_heads=heads), **slots)))
        slots = {"resident": plans[-1].resident, "resident_heads": plans[-1].resident_heads}
        following = steps[min(number + 1, len(steps) - 1)].scoring()
        known = plans[-1].next_scoring() if ahead else following
    ends = simulate(plans).optimizer_steps
    return (ends[-2] - ends[1]) / sum(ideal[2:-1])


@dataclass
class Row:
    """Figures of one case, one entry for each batch."""

    case: Case
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)

    def text(self, name: str, digits: int = 2) -> str:
        values = self.figures.get(name)
        return f"{fmean(values):.{digits}f}/{max(values):.{digits}f}" if values else "-"


def measure(case: Case, batches: int, pipeline: bool) -> Row:
    """All figures of one case."""
    row = Row(case)
    watched = sorted({0, case.blocks // 2})
    histories: dict[int, list[BlockStep]] = {block: [] for block in watched}
    before: list[set[str]] = []
    experts, dense = case.teacher_bytes()
    for seed in range(batches):
        batch = case.draw(seed)
        shape = case.shape(batch)
        started = time.process_time()
        shares = shared(case, batch)
        sharing = time.process_time() - started
        steps = [block_step(case, shape, share) for share in shares]
        for block in watched:
            histories[block].append(steps[block])
        needed = sum(map(len, batch))
        seen = [set(step.teachers) for step in steps]
        computed = case.block * sum(step.teacher_tokens for step in steps)
        bound = case.block * sum(step.teacher_bound for step in steps)
        work = [step.work for step in steps]
        row.add("bound", bound / needed)
        row.add("computed", computed / bound)
        student_bound = sum(step.student_bound for step in steps)
        row.add("student", sum(sum(step.student.sizes) for step in steps) / student_bound)
        row.add("before", dealt_to_all(case, batch, shape.max_tokens))
        row.add("slowest", max(work) / fmean(work))
        row.add("slowest teachers", max(s.teacher_tokens for s in steps) * case.dp / computed)
        row.add("slowest / needed", max(work) * case.dp / (4 * needed))
        row.add("loads", max(map(len, seen)))
        for old, now in zip(before, seen):
            row.add("copied", len(now - old if len(now) == 1 else now) * (experts + dense) / 2**30)
        if before:
            row.add("new", fmean(not now <= old for now, old in zip(seen, before)))
        before = seen
        row.add("planning", 1e3 * (sharing + planning_seconds(case, shape, shares[-1])))
        tokens = max(sum(map(len, share)) for share in shares) / case.block
        row.add("rollout", (8 * tokens + 32 * len(batch)) / 2**20)
    if pipeline:
        for history in histories.values():
            row.add("pipeline", steady_state(case, history, Planner(effort=30_000)))
    for mode, size in (
        ("host", case.teachers * (experts + dense)),
        ("sharded", case.teachers * (experts + dense / case.block)),
    ):
        row.add(mode, 8 * size / 2**30)
    return row


def planning_seconds(case: Case, shape: BatchShape, share: Sequence[Sample]) -> float:
    """Dividing one block and planning its pipeline without a search, as in a run's first steps."""
    started = time.process_time()
    step = block_step(case, shape, share)
    Planner(effort=0).plan(
        PlanRequest(
            case.pp,
            len(step.student.sizes),
            case.costs(),
            sizes=step.student.sizes,
            scoring=step.scoring(),
        )
    )
    return time.process_time() - started


def print_rows(rows: Sequence[Row]) -> None:
    print(
        "| teachers | lengths, budget | DP | block | bound | computed | student | before "
        "| slowest: work, teachers | loads | new | plan (ms) |"
    )
    print("|---|---|" + "---:|" * 10)
    for row in rows:
        case = row.case
        limit = -(-case.teachers // case.blocks) + 1
        print(
            f"| {case.teachers} {case.shares} | {case.lengths}, {case.budget // 1024}k | {case.dp} "
            f"| {case.block} | {row.text('bound')} | {row.text('computed')} | {row.text('student')} "
            f"| {row.text('before', 1)} | {row.text('slowest')}, {row.text('slowest teachers')} "
            f"| {max(row.figures['loads']):.0f} ({limit}) | {row.text('new')} "
            f"| {row.text('planning', 0)} |"
        )


def print_layouts(rows: Sequence[Row]) -> None:
    print(
        "| model | GPUs: TP, PP, EP, CP | DP, block | teachers | samples a rank | bound | computed "
        "| slowest: work, teachers | pipeline | step | loads | plan (ms) | copied (GiB) "
        "| host, sharded (GiB) | rollout (MiB) |"
    )
    print("|---|---|---|---|" + "---:|" * 11)
    for row in rows:
        case = row.case
        step = [ratio * max(row.figures["pipeline"]) for ratio in row.figures["slowest / needed"]]
        print(
            f"| {case.model.name} | {case.dp * case.tp * case.pp * case.cp}: {case.tp}, {case.pp}, "
            f"{case.ep}, {case.cp} | {case.dp}, {case.block} | {case.teachers} {case.shares} "
            f"| {case.samples} | {row.text('bound')} | {row.text('computed')} "
            f"| {row.text('slowest')}, {row.text('slowest teachers')} | {row.text('pipeline', 3)} "
            f"| {fmean(step):.2f}/{max(step):.2f} | {max(row.figures['loads']):.0f} "
            f"({-(-case.teachers // case.blocks) + 1}) | {row.text('planning', 0)} "
            f"| {row.text('copied', 1)} | {row.figures['host'][0]:.0f}, {row.figures['sharded'][0]:.0f} "
            f"| {row.text('rollout', 1)} |"
        )


def print_planning() -> None:
    """CPU time of planning one rank on up to 4,096 data-parallel ranks."""
    print("| DP | block | pipeline | sharing (ms) | own block (ms) | all blocks' ranks (ms) |")
    print("|---:|---:|---:|---:|---:|---:|")
    for case in (
        Case(512, 1),
        Case(512, 8, pp=8),
        Case(4096, 1, shares="zipf"),
        Case(4096, 8, shares="zipf", pp=8),
        Case(4096, 64, shares="zipf"),
    ):
        batch = case.draw(0)
        shape = case.shape(batch)
        times = []
        for _ in range(3):
            started = time.process_time()
            shares = shared(case, batch)
            sharing = time.process_time() - started
            own = planning_seconds(case, shape, shares[0])
            started = time.process_time()
            for share in shares:
                Division(share, case.block, shape, lambda t: t.domain).per_rank()
            times.append((sharing, own, time.process_time() - started))
        least = [1e3 * min(column) for column in zip(*times)]
        print(
            f"| {case.dp} | {case.block} | {case.pp} | " + " | ".join(f"{ms:.0f}" for ms in least) + " |",
            flush=True,
        )


ASSUMPTIONS = f"""\
Assumptions: 16 samples a data-parallel rank, at least 512 a batch, unless a column says otherwise; lengths
log-normal (sigma 0.8) with the stated mean, or a quarter of them with mean 16k and the others 1k (long tail),
cut at {LONGEST:,}; a token budget below the batch's longest sequence becomes that length, as in training;
student and teachers of the same size; a student's forward and backward pass of a token cost three teacher's;
{FLOPS / 1e12:.0f} TFLOP/s a GPU, {LOAD_BYTES_PER_SECOND / 1e9:.0f} GB/s from host to GPU, bfloat16 teachers;
no time for messages, collectives and the optimizer step; a pipeline of two blocks stands for all of its
layout; blocks wait for each other once a step. Nothing was measured on a GPU; milliseconds are this
machine's CPU time. Cells are mean/worst over consecutive batches with seeds 0, 1, 2 ..."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="more cases, and eight batches of each")
    parser.add_argument("--batches", type=int, help="consecutive batches of each case")
    parser.add_argument(
        "--tables", nargs="+", choices=("sharing", "layouts", "planning"), help="default: all three"
    )
    options = parser.parse_args()
    batches = options.batches or (8 if options.full else 5)
    if batches < 4:
        parser.error("--batches: a steady state needs at least 4")
    tables = options.tables or ("sharing", "layouts", "planning")
    print(ASSUMPTIONS, flush=True)
    if "sharing" in tables:
        cases = sharing_cases(options.full)
        print("\nSharing and packing\n")
        print_rows([measure(case, batches, False) for case in progress(cases, "sharing and packing")])
    if "layouts" in tables:
        cases = layout_cases(options.full)
        print("\nLayouts, with their pipelines\n", flush=True)
        print_layouts([measure(case, batches + 1, True) for case in progress(cases, "layouts")])
    if "planning" in tables:
        print("\nPlanning, one rank\n", flush=True)
        print_planning()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
