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

from megatron_mopd.data.batching import BatchShape
from megatron_mopd.data.blocks import share_among_blocks
from megatron_mopd.data.division import Cut, Division
from megatron_mopd.observe.progress import progress
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.instructions import Plan
from megatron_mopd.pipeline.plan import Planner, bubble_free_time
from megatron_mopd.pipeline.problem import Limits, PlanRequest, ScoringTask
from megatron_mopd.pipeline.simulate import simulate
from megatron_mopd.training.scoring_tasks import scoring_task

LONGEST = 32_000
FLOPS = 0.4 * 989e12
"""Sustained by one GPU: 40% of an H100's bfloat16 peak."""
LOAD_BYTES_PER_SECOND = 40e9
"""From host memory to one GPU."""


@dataclass(frozen=True)
class Model:
    """Student and teachers alike, in bfloat16; a forward pass takes 2 FLOPs a parameter that a token uses, a
    backward pass twice that."""

    name: str
    experts: float
    """Parameters in experts."""
    dense: float
    """Parameters elsewhere."""
    active: float
    """Parameters that one token uses."""


SMALL = Model("Qwen3-30B-A3B", experts=29.0e9, dense=1.5e9, active=3.3e9)
LARGE = Model("Qwen3-235B-A22B", experts=227e9, dense=8e9, active=22e9)


@dataclass(frozen=True)
class Sample:
    """A trajectory of which only index, domain and length matter."""

    index: int
    domain: str
    length: int

    def __len__(self) -> int:
        return self.length


@dataclass(frozen=True)
class Case:
    """A layout with teachers and a distribution of lengths."""

    dp: int
    block: int = 1
    teachers: int = 12
    shares: str = "equal"
    lengths: str = "3k"
    budget: int = 16_384
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    model: Model = SMALL
    samples: int = 16
    """Of each data-parallel rank; the batch has at least 512."""

    @classmethod
    def of_layout(cls, gpus: int, tp: int, pp: int, ep: int, cp: int = 1, **rest) -> Case:
        """A case with the data-parallel size and the block of a layout."""
        return cls(gpus // (tp * pp * cp), max(1, ep // (tp * cp)), tp=tp, pp=pp, ep=ep, cp=cp, **rest)

    @property
    def blocks(self) -> int:
        return self.dp // self.block

    def draw(self, seed: int) -> list[Sample]:
        """A random batch. Lengths are log-normal with the stated mean, or for `long tail` three quarters of
        1k and a quarter of 16k; cut at `LONGEST`. With `zipf` the n-th domain is 1/n as frequent as the
        first."""
        rng = np.random.default_rng(seed)
        count = max(512, self.samples * self.dp)
        weights = 1 / np.arange(1, self.teachers + 1) ** (1.0 if self.shares == "zipf" else 0.0)
        domains = rng.choice(self.teachers, count, p=weights / weights.sum())
        if self.lengths == "long tail":
            means = rng.choice([1_000, 16_000], count, p=[0.75, 0.25])
        else:
            means = np.full(count, 1_000 * int(self.lengths.removesuffix("k")))
        sigma = 0.8
        drawn = rng.lognormal(np.log(means) - sigma**2 / 2, sigma)
        lengths = np.clip(drawn.astype(int), 64, LONGEST).tolist()
        return [Sample(i, f"d{d:02}", n) for i, (d, n) in enumerate(zip(domains.tolist(), lengths))]

    def shape(self, batch: Sequence[Sample]) -> BatchShape:
        """The shape of packed micro-batches of this layout."""
        longest = max(map(len, batch))
        alignment = self.tp * (2 * self.cp if self.cp > 1 else 1)
        budget = -(-max(self.budget, longest) // alignment) * alignment
        return BatchShape(1, budget, longest, alignment, self.cp, 0)

    def teacher_bytes(self) -> tuple[float, float]:
        """Bytes of one teacher on one GPU: its experts, and the rest."""
        experts = 2 * self.model.experts / (self.pp * self.ep)
        return experts, 2 * self.model.dense / (self.pp * self.tp)

    def costs(self) -> CostModel:
        """Seconds a token and stage."""
        forward = 2 * self.model.active / (self.tp * self.cp * self.pp) / FLOPS
        names = [f"d{number:02}" for number in range(self.teachers)]
        load = sum(self.teacher_bytes()) / LOAD_BYTES_PER_SECOND
        return CostModel.build(
            self.pp,
            student_forward=forward,
            student_backward=2 * forward,
            teacher_forward=dict.fromkeys(names, forward),
            teacher_load=dict.fromkeys(names, load),
        )


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
    return share_among_blocks(
        batch, case.blocks, lambda t: t.domain, lambda t: 4 * len(t), case.block, scoring_cost=len
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


GRID = [(8, 1), (8, 4), (32, 1), (32, 8), (64, 8), (128, 8), (128, 32), (512, 1), (512, 8), (512, 64)]


def sharing_cases(full: bool) -> list[Case]:
    """Sharing and packing alone."""
    cases = [Case(dp, block, shares=shares) for shares in ("equal", "zipf") for dp, block in GRID]
    others = GRID if full else [(8, 4), (64, 8), (512, 8)]
    for teachers in (4, 24, 48):
        cases += [Case(dp, block, teachers, "zipf") for dp, block in others]
        if full:
            cases += [Case(dp, block, teachers) for dp, block in others]
    lengths = [("2k", 16_384), ("8k", 16_384), ("long tail", 16_384), ("8k", 32_768), ("long tail", 32_768)]
    for name, budget in lengths if full else lengths[1:3]:
        for dp, block in others:
            cases.append(Case(dp, block, shares="zipf", lengths=name, budget=budget))
    return cases


def layout_cases(full: bool) -> list[Case]:
    """The layouts of docs/cluster.md, one of 2,048 GPUs, and deeper pipelines with m >= 2p."""
    small = [(32, 2, 2, 8), (32, 1, 1, 8), (32, 1, 1, 32), (32, 4, 1, 8), (16, 2, 2, 8), (32, 2, 2, 8, 2)]
    large = [(256, 4, 2, 32), (256, 4, 2, 64), (256, 4, 2, 128), (128, 4, 2, 64), (256, 8, 2, 32)]
    large += [(256, 4, 2, 64, 2)]
    cases = [Case.of_layout(*layout, shares="zipf") for layout in small]
    cases += [Case.of_layout(*layout, shares="zipf", model=LARGE, samples=32) for layout in large]
    cases += [Case.of_layout(2048, 4, 4, 64, shares="zipf", model=LARGE, samples=64)]
    for shares in ("equal", "zipf"):
        cases += [Case.of_layout(64, 1, 8, 1, shares=shares, samples=192)]
        cases += [Case.of_layout(512, 1, 8, 8, shares=shares, samples=192)]
    if full:
        cases += [Case.of_layout(256, 1, 16, 8, shares="zipf", samples=384)]
        cases += [Case.of_layout(512, 1, 4, 8, teachers=48, shares="zipf", samples=96)]
    return cases


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
