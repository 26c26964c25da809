"""Estimate the cost of a pipeline with teachers in its bubbles, and draw its timeline.

    python tools/plan_pipeline.py --stages 8 --microbatches 32
    python tools/plan_pipeline.py --stages 4 --microbatches 16 --virtual-stages 2 --teacher math=8 \\
        --teacher code=8 --teacher-cost 3 --last-stage-extra 0.5 --picture timeline.png --trace timeline.json

Prints the time of an optimizer step relative to a bubble-free step for every schedule, and draws the chosen
schedule over one rollout batch. All costs are multiples of the student's forward time on one stage.
"""

from __future__ import annotations

import argparse
import sys
import time

from megatron_mopd.backend.messages import visible
from megatron_mopd.pipeline.check import check_plan
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.plan import Planner
from megatron_mopd.pipeline.problem import KINDS, Limits
from megatron_mopd.pipeline.scenarios import (
    Workload,
    packed_ratio,
    rollout_batch,
    rollout_batch_ratio,
    steady_state_ratio,
)
from megatron_mopd.pipeline.simulate import simulate
from megatron_mopd.pipeline.timeline import draw_timeline, write_chrome_trace


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, required=True, help="pipeline stages p")
    parser.add_argument(
        "--microbatches", type=int, required=True, help="student micro-batches per optimizer step"
    )
    parser.add_argument("--virtual-stages", type=int, default=1, help="model chunks per stage (student only)")
    parser.add_argument(
        "--teachers", type=int, default=8, help="number of teachers sharing the micro-batches evenly"
    )
    parser.add_argument(
        "--teacher",
        action="append",
        default=[],
        metavar="NAME=COUNT",
        help="a teacher and the number of micro-batches it scores; repeatable; replaces --teachers",
    )
    parser.add_argument("--forward-cost", type=float, default=1.0, help="student forward of one stage")
    parser.add_argument("--backward-cost", type=float, default=2.0, help="student backward of one stage")
    parser.add_argument("--teacher-cost", type=float, default=1.0, help="teacher forward of one stage")
    parser.add_argument(
        "--teacher-load", type=float, default=0.0, help="copying one teacher's layers to one stage"
    )
    parser.add_argument(
        "--head-load", type=float, default=0.0, help="copying one teacher's head to the last stage"
    )
    parser.add_argument(
        "--last-stage-extra",
        type=float,
        default=0.0,
        help="extra student work of the last stage (heads, loss)",
    )
    parser.add_argument(
        "--message", type=float, default=0.0, help="transfer time of a message between two stages"
    )
    parser.add_argument("--optimizer", type=float, default=0.0, help="the optimizer step itself")
    parser.add_argument(
        "--steps-per-rollout", type=int, default=4, help="optimizer steps fed by one rollout batch"
    )
    parser.add_argument("--activations", type=int, help="limit: activations in flight per stage, in chunks")
    parser.add_argument("--resident-teachers", type=int, default=2, help="limit: teachers resident per stage")
    parser.add_argument(
        "--cached-states", type=int, help="limit: cached teacher states per stage, in micro-batches"
    )
    parser.add_argument("--kind", choices=KINDS, default="bubble_fill", help="the schedule to draw")
    parser.add_argument(
        "--picture", default="pipeline_timeline.png", help="where to draw the timeline; '' to skip"
    )
    parser.add_argument("--trace", default="", help="also write a Chrome/Perfetto trace here")
    return parser.parse_args(arguments)


def teacher_counts(options: argparse.Namespace) -> dict[str, int]:
    """Micro-batches per teacher, from --teacher or spread evenly over --teachers."""
    if not options.teacher:
        number = max(1, min(options.teachers, options.microbatches)) if options.teachers else 0
        share, rest = divmod(options.microbatches, number) if number else (0, 0)
        return {f"t{i}": share + (i < rest) for i in range(number)}
    counts = {}
    for item in options.teacher:
        name, _, count = item.partition("=")
        if not name or not count.isdigit():
            raise ValueError(f"--teacher {item!r}: expected NAME=COUNT, for example math=8")
        counts[name] = int(count)
    return counts


def build_workload(options: argparse.Namespace) -> Workload:
    """The workload described by the options. The last stage's extra work is split between forward and
    backward in the same ratio as the other work.
    """
    p, v = options.stages, options.virtual_stages
    if p < 1 or v < 1:
        raise ValueError(f"--stages {p}, --virtual-stages {v}: both must be at least 1")
    counts = teacher_counts(options)
    forward, backward = options.forward_cost, options.backward_cost
    both = forward + backward or 1.0
    forwards, backwards = [forward / v] * (p * v), [backward / v] * (p * v)
    forwards[-1] += options.last_stage_extra * forward / both
    backwards[-1] += options.last_stage_extra * backward / both
    costs = CostModel.build(
        p,
        v,
        student_forward=forwards,
        student_backward=backwards,
        teacher_forward=dict.fromkeys(counts, options.teacher_cost),
        teacher_load=dict.fromkeys(counts, options.teacher_load),
        head_load=dict.fromkeys(counts, options.head_load),
        message=options.message,
        optimizer=options.optimizer,
    )
    limits = Limits(options.activations, options.resident_teachers, None, options.cached_states)
    return Workload(p, options.microbatches, costs, counts, v, limits)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    started = time.perf_counter()
    try:
        work, planner, steps = build_workload(options), Planner(), options.steps_per_rollout
        if steps < 1:
            raise ValueError(f"--steps-per-rollout {steps}: must be at least 1")
        rows = [("bubble_fill", "next batch already sampled", steady_state_ratio(planner, work))]
        rows += [
            (
                kind,
                f"{steps} optimizer steps per rollout batch",
                rollout_batch_ratio(planner, work, kind, steps),
            )
            for kind in KINDS
        ]
        rows.append(("packed", "teachers in the student's forward slot", packed_ratio(planner, work)))
        plans, _ = rollout_batch(planner, work, options.kind, steps)
        for plan in plans:
            check_plan(plan)
        result = simulate(plans, record=True)
    except ValueError as error:
        print(f"error: {visible(error)}", file=sys.stderr)
        return 2

    free, bound = work.bubble_free(), work.bound()
    print(f"bubble-free optimizer step: {free:g}; lower bound of any schedule: {bound / free:.3f} of it\n")
    print(f"{'schedule':<14}{'time / bubble-free':>19}   when")
    for kind, note, ratio in rows:
        print(f"{kind:<14}{ratio:>19.3f}   {note}")
    print(f"\n{options.kind} over one rollout batch of {steps} optimizer steps, per stage:")
    print(f"{'stage':>5}{'idle':>8}{'peak activations':>18}{'peak cached states':>20}")
    for stage, idle in enumerate(result.idle_share):
        cells = result.peak_activations[stage], result.peak_cached_states[stage]
        print(f"{stage:>5}{idle:>8.1%}{cells[0]:>18}{cells[1]:>20}")
    title = f"{options.kind}, planned: p={work.stages}, v={work.virtual_stages}, m={work.microbatches}"
    if options.picture:
        draw_timeline({title: result.events}, options.picture)
        print(f"\ntimeline drawn: {visible(options.picture)}")
    if options.trace:
        write_chrome_trace({title: result.events}, options.trace)
        print(f"trace written: {visible(options.trace)} (open it in ui.perfetto.dev)")
    print(f"planned, checked and simulated in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
