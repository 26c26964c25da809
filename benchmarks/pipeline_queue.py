"""Plans on a GPU with one hardware queue: which orders of receives deadlock, and what the queue costs.

    python -m benchmarks.pipeline_queue --plans 2000          # two minutes on one core
    python -m benchmarks.pipeline_queue --steady              # p=8, m=32, the cases of pipeline_plans.py

Draws random requests (1-16 stages, 1-4 chunks, 1-64 micro-batches, 0-8 teachers, every kind of schedule,
limits), plans them, and executes every plan with one queue per stream (`simulate`) and with one for all
(`simulate_one_queue`), under three orders of the receives:

    planned       that of `pipeline/messages.py`
    early         each receive before the computation that runs when its sender starts
    at the end    each receive directly before the computation that needs it

The cost is the time with one queue relative to that of the planned order with a queue per stream, over the
plans that do not deadlock. `--deviation 0.1` changes every duration at random by up to 10% after planning.
`--steady` prints the time of an optimizer step in the steady state relative to a bubble-free one instead.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from benchmarks.pipeline_plans import VARIANTS, workload
from megatron_mopd.pipeline.check import find_problems
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.instructions import (
    Compute,
    Instruction,
    Plan,
    Receive,
    Send,
)
from megatron_mopd.pipeline.one_queue import simulate_one_queue
from megatron_mopd.pipeline.plan import Planner, make_plan
from megatron_mopd.pipeline.problem import KINDS, Limits, PlanRequest, split_scoring
from megatron_mopd.pipeline.scenarios import chain
from megatron_mopd.pipeline.simulate import PlanError, simulate


def early(plan: Plan) -> Plan:
    """The same plan with each receive before the computation that runs here when its sender starts."""
    starts: list[list[float]] = [[] for _ in plan.stages]
    began: dict[tuple[int, Instruction], float] = {}
    for event in simulate(plan, record=True).events:
        if isinstance(event.instruction, Compute):
            starts[event.stage].append(event.start)
            began[event.stage, event.instruction] = event.start
    departure: dict[Send, float] = {}
    for stage, entries in enumerate(plan.stages):
        for before, entry in zip(entries, entries[1:]):
            if isinstance(entry, Send):
                departure[entry] = began[stage, before]

    def place(stage: int, receive: Receive, number: int) -> int:
        sent = departure[Send(receive.channel, receive.consumer)]
        return min(number, max(0, bisect_left(starts[stage], sent) - 1))

    return _moved(plan, place)


def at_the_end(plan: Plan) -> Plan:
    """The same plan with each receive directly before the computation that needs it."""
    return _moved(plan, lambda stage, receive, number: number)


def _moved(plan: Plan, place) -> Plan:
    """`place(stage, receive, number of its consumer among the computations)` is the new position of a
    receive."""
    lists = []
    for stage, entries in enumerate(plan.stages):
        rest = [entry for entry in entries if not isinstance(entry, Receive)]
        computes = [entry for entry in rest if isinstance(entry, Compute)]
        numbers = {compute: number for number, compute in enumerate(computes)}
        posted: dict[int, list[Receive]] = {}
        for entry in entries:
            if isinstance(entry, Receive):
                posted.setdefault(place(stage, entry, numbers[entry.consumer]), []).append(entry)
        lists.append([])
        for entry in rest:
            lists[-1] += posted.get(numbers.get(entry, -1), ())
            lists[-1].append(entry)
    return replace(plan, stages=tuple(map(tuple, lists)))


def _vary(choose: random.Random, spread: float, times: Sequence[float]) -> list[float]:
    return [time * choose.uniform(1 - spread, 1 + spread) for time in times]


def requests(seed: int, count: int) -> Iterator[PlanRequest]:
    """Random requests that some plan can satisfy."""
    choose = random.Random(seed)
    while count:
        p, v = choose.choice([1, 2, 2, 3, 4, 4, 5, 6, 8, 8, 12, 16]), choose.choice([1, 1, 1, 2, 2, 3, 4])
        m = min(64, choose.choice([1, 2, 3, p, p + 1, 2 * p, 4 * p]))
        names = [f"t{number}" for number in range(min(m, choose.choice([0, 1, 2, 4, 8])))]
        vary = partial(_vary, choose, choose.choice([0.0, 0.0, 0.1, 0.4]))
        cost = choose.choice([0.1, 0.3, 1.0, 1.0, 3.0])
        head = choose.choice([0.0, 0.0, 0.5])
        forwards, backwards = vary([1 / v] * (p * v)), vary([2 / v] * (p * v))
        forwards[-1] += head / 3
        backwards[-1] += head * 2 / 3
        costs = CostModel.build(
            p,
            v,
            student_forward=forwards,
            student_backward=backwards,
            teacher_forward={name: vary([cost] * p) for name in names},
            teacher_load={name: choose.choice([0.0, 0.5, 2.0]) for name in names},
            message=choose.choice([0.0, 0.0, 0.02, 0.1]),
            optimizer=choose.choice([0.0, 0.5]),
        )
        counts = {name: len(range(number, m, len(names))) for number, name in enumerate(names)}
        kind = choose.choice([*KINDS, "bubble_fill", "bubble_fill", "bubble_fill"])
        scoring = split_scoring(counts, scored=choose.random() < 0.5)
        if kind != "back_to_back" and choose.random() < 0.7:
            scoring += split_scoring(counts, step=1)
        limits = Limits(choose.choice([None, None, None, v + 1, v * p + p]), choose.choice([2, 2, 1, 3]))
        request = PlanRequest(p, m, costs, v, scoring, kind=kind, limits=limits)
        if names and choose.random() < 0.4:
            cache = request.smallest_cache() + choose.choice([0, 1, 2, m])
            request = replace(request, limits=replace(limits, cached_states=cache))
        try:
            request.validate()
        except ValueError:
            continue
        count -= 1
        yield request


def deviating(plan: Plan, deviation: float, seed: int) -> Plan:
    """The same plan with durations that differ from the planned ones by up to this share."""
    vary, costs = partial(_vary, random.Random(seed), deviation), plan.request.costs
    costs = replace(
        costs,
        student_forward=tuple(vary(costs.student_forward)),
        student_backward=tuple(vary(costs.student_backward)),
        teacher_forward=tuple((name, tuple(vary(times))) for name, times in costs.teacher_forward),
    )
    return replace(plan, request=replace(plan.request, costs=costs))


def print_steady_states(steps: int = 3) -> None:
    """The cases of `pipeline_plans.py` with 8 stages and 32 micro-batches."""
    print("| case | a queue per stream | one queue |\n|---|---:|---:|")
    for name, variant in VARIANTS.items():
        work = workload(8, 32, variant)
        plans = chain(Planner(effort=30_000), work, "bubble_fill", steps + 3, reach=1)[:-1]
        ends = [execute(plans).optimizer_steps for execute in (simulate, simulate_one_queue)]
        ratios = [(times[-1] - times[-1 - steps]) / (steps * work.bubble_free()) for times in ends]
        print(f"| {name} | {ratios[0]:.3f} | {ratios[1]:.3f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deviation", type=float, default=0.0)
    parser.add_argument("--steady", action="store_true")
    options = parser.parse_args()
    if options.steady:
        print_steady_states()
        return 0
    orders = {"planned": lambda plan: plan, "early": early, "at the end": at_the_end}
    deadlocks, costs = dict.fromkeys(orders, 0), {name: [] for name in orders}
    seconds = dict.fromkeys(("planning", "find_problems", "one queue", "a queue per stream"), 0.0)

    def timed(what: str, function, *arguments):
        start = time.process_time()
        try:
            return function(*arguments)
        finally:
            seconds[what] += time.process_time() - start

    instructions = 0
    for number, request in enumerate(requests(options.seed, options.plans)):
        plan = timed("planning", partial(make_plan, effort=0), request)
        assert not timed("find_problems", find_problems, plan)
        timed("one queue", simulate_one_queue, plan)
        instructions += sum(map(len, plan.stages))
        free = timed("a queue per stream", simulate, deviating(plan, options.deviation, number)).total
        for name, order in orders.items():
            try:
                total = simulate_one_queue(deviating(order(plan), options.deviation, number)).total
                costs[name].append(total / free)
            except PlanError:
                deadlocks[name] += 1
    print("| order | deadlocks | cost of one queue: mean | 90th percentile | largest |")
    print("|---|---:|---:|---:|---:|")
    for name, values in costs.items():
        ninth = statistics.quantiles(values, n=10)[-1]
        cells = f"{statistics.mean(values):.4f} | {ninth:.4f} | {max(values):.3f}"
        print(f"| {name} | {deadlocks[name]} of {options.plans} | {cells} |")
    spent = ", ".join(f"{what} {1e6 * value / instructions:.1f}" for what, value in seconds.items())
    print(f"\nCPU time in microseconds per instruction: {spent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
