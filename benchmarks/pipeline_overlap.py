"""Compare the real runtime with the time that the planner predicts.

    python -m benchmarks.pipeline_overlap                     # both parts, a few minutes on two idle cores
    python -m benchmarks.pipeline_overlap --part sleep --stages 8 --picture timeline.png
    python -m benchmarks.pipeline_overlap --part model

`sleep`: one process per stage, gloo, stages that sleep instead of computing, so that eight of them fit on two
cores. Every schedule runs one rollout batch of several optimizer steps, a few times, alternating between
schedules; prints the simulated and the measured time of an optimizer step and their ratio.

`model`: a real model on two pipeline stages, trained with every schedule in turn, on the same samples; prints
the median time of an optimizer step and its ratio to `back_to_back`. Losses must agree.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.backend.parallel import build_parallel_groups, select_device
from megatron_mopd.config import ModelConfig, config_from_dict
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.model.build import build_model
from megatron_mopd.pipeline.communicator import PipelineCommunicator
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.instructions import OptimizerStep, Plan, TeacherForward
from megatron_mopd.pipeline.plan import Planner
from megatron_mopd.pipeline.problem import KINDS
from megatron_mopd.pipeline.runtime import Execution, Recording, Stopwatch
from megatron_mopd.pipeline.scenarios import Workload, rollout_batch
from megatron_mopd.pipeline.simulate import simulate
from megatron_mopd.pipeline.timeline import draw_timeline, without_waiting, write_chrome_trace
from megatron_mopd.teachers.bank import TeacherBank, TeacherSource
from megatron_mopd.teachers.routing import Routing
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_steps
from tests._megatron_schedules import MegatronSchedules


def run_ranks(count: int, function: Callable, *arguments):
    """Fork `count` ranks connected by gloo; returns rank 0's result."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        queue = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(rank, count, directory, queue, function, arguments))
            for rank in range(count)
        ]
        for process in ranks:
            process.start()
        result = queue.get()
        for process in ranks:
            process.join(30)
            process.kill()
    if isinstance(result, Exception):
        raise result
    return result


def _rank(rank, count, directory, queue, function, arguments):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(f"{directory}/store", count), rank=rank, world_size=count
        )
        result = function(rank, *arguments)
        dist.barrier()
        if rank == 0:
            queue.put(result)
    except Exception as error:
        traceback.print_exc()
        queue.put(RuntimeError(f"rank {rank} failed: {error}"))
    sys.stdout.flush()
    os._exit(0)


# --- stages that sleep -----------------------------------------------------------------------------------


class SleepingWork:
    """A `StageWork` whose computations take exactly their planned time and whose messages are real."""

    def __init__(self, plan, stage: int, seconds: float, size: int):
        self.costs, self.p, self.stage = plan.request.costs, plan.request.stages, stage
        self.seconds, self.size = seconds, size
        self.result = torch.zeros(size)

    def _sleep(self, cost: float) -> torch.Tensor:
        time.sleep(cost * self.seconds)
        return self.result

    def message(self, consumer):
        return (self.size,), torch.float32

    def teacher_forward(self, entry: TeacherForward, hidden):
        return self._sleep(self.costs.teacher(entry.job.teacher)[self.stage])

    def student_forward(self, entry, hidden):
        return self._sleep(self.costs.student_forward[entry.chunk * self.p + self.stage])

    def student_backward(self, entry, gradient):
        return self._sleep(self.costs.student_backward[entry.chunk * self.p + self.stage])

    def load(self, entry):
        pass

    def synchronize(self):
        dist.barrier()

    def finish_gradients(self):
        dist.barrier()
        self._sleep(self.costs.optimizer)


def sleeping_workload(options, stages: int) -> Workload:
    number = 4
    m = options.microbatches_per_stage * stages
    counts = {f"teacher{i}": m // number for i in range(number)}
    costs = CostModel.build(
        stages,
        options.virtual_stages,
        teacher_forward=dict.fromkeys(counts, options.teacher_cost),
        optimizer=0.5,
    )
    return Workload(stages, m, costs, counts, options.virtual_stages)


def run_plan(
    plan: Plan, rank: int, work: SleepingWork, channels: PipelineCommunicator, stopwatch: Stopwatch
) -> Recording:
    execution = Execution(plan.stages[rank], rank, work, channels, stopwatch)
    execution.run_to_update()
    execution.run_rest()
    return execution.recording


def sleep_rank(rank: int, options, stages: int, kinds: dict):
    """Seconds per optimizer step of every kind and repetition, and one timeline of each kind."""
    device = torch.device("cpu")
    channels = PipelineCommunicator(dist.group.WORLD, device, virtual_stages=options.virtual_stages)
    measured: dict[str, list[float]] = {kind: [] for kind in KINDS}
    timelines = {}
    for _ in range(options.repeats):
        for kind, plans in kinds.items():
            channels.flush()
            dist.barrier()
            started = time.perf_counter()
            recordings = [
                run_plan(
                    plan,
                    rank,
                    SleepingWork(plan, rank, options.unit, options.message),
                    channels,
                    Stopwatch(device, started),
                )
                for plan in plans
            ]
            steps = [recording.events() for recording in recordings]
            events = [event for step in steps for event in step]
            # As in the simulation, until the last optimizer step is complete.
            end = max(event.end for event in events if isinstance(event.instruction, OptimizerStep))
            seconds = torch.tensor([end])
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            measured[kind].append(seconds.item() / options.steps)
            gathered = [None] * stages
            dist.all_gather_object(gathered, steps)
            timelines[kind] = [
                event
                for parts in zip(*gathered)
                for event in without_waiting([event for part in parts for event in part])
            ]
    return measured, timelines


def sleep_part(options) -> bool:
    print(
        f"\nstages that sleep: student forward {1000 * options.unit:g} ms, backward twice that, teacher "
        f"{options.teacher_cost:g} x the forward, v={options.virtual_stages}, {options.steps} optimizer "
        f"steps per rollout batch, messages of {4 * options.message / 1024:g} KiB; median of "
        f"{options.repeats}\n"
    )
    print(
        "| p | m | schedule | simulated, s/step | measured, s/step | measured / simulated | to bubble-free |"
    )
    print("|---:|---:|---|---:|---:|---:|---:|", flush=True)
    worst = 0.0
    for stages in options.stages:
        work = sleeping_workload(options, stages)
        free = work.bubble_free() * options.unit
        kinds = {kind: rollout_batch(Planner(), work, kind, options.steps) for kind in KINDS}
        plans = {kind: pair[0] for kind, pair in kinds.items()}
        measured, timelines = run_ranks(stages, sleep_rank, options, stages, plans)
        panels = {}
        for kind, (_, result) in kinds.items():
            simulated = result.optimizer_steps[-1] * options.unit / options.steps
            median = statistics.median(measured[kind])
            worst = max(worst, abs(median / simulated - 1))
            print(
                f"| {stages} | {work.microbatches} | {kind} | {simulated:.3f} | {median:.3f} | "
                f"{median / simulated:.3f} | {median / free:.3f} |",
                flush=True,
            )
            planned = simulate(plans[kind], record=True).events
            panels[f"p={stages} {kind}, simulated"] = [
                e._replace(start=e.start * options.unit, end=e.end * options.unit) for e in planned
            ]
            panels[f"p={stages} {kind}, measured"] = timelines[kind]
        if options.picture and stages == options.stages[-1]:
            draw_timeline(panels, options.picture, unit="seconds")
            write_chrome_trace(panels, f"{options.picture}.json")
            print(f"\ntimelines drawn: {options.picture}, trace: {options.picture}.json")
    print(f"\nlargest deviation from the simulation: {worst:.1%}")
    return worst <= 0.05


# --- a real model -----------------------------------------------------------------------------------------


def build_learner(options) -> Learner:
    config = config_from_dict(
        {
            "run_dir": "unused",
            "device": "cpu",
            "parallel": {"pipeline_model_parallel_size": 2},
            "objective": {"kind": "full_vocab_kl"},
            "optimizer": {"use_distributed_optimizer": False, "lr": 1e-4},
            "schedule": {
                "micro_batch_size": options.micro_batch_size,
                "global_batch_size": options.micro_batch_size * options.model_microbatches,
                "steps_per_rollout": options.model_steps,
            },
        }
    )
    groups = build_parallel_groups(config.parallel, select_device("cpu"), config.seed)
    model = ModelConfig(
        vocab_size=512,
        transformer=dict(
            num_layers=options.layers,
            hidden_size=options.hidden_size,
            num_attention_heads=4,
            ffn_hidden_size=3 * options.hidden_size,
        ),
    )
    chunks = build_model(model, groups, config.params_dtype, max_sequence_length=options.length, seed=1)
    names = ["math", "code", "chat", "safety"]
    sources = [TeacherSource(name, model, 10 + number) for number, name in enumerate(names)]
    wrapped = wrap_data_parallel(chunks, config, groups)
    optimizer, scheduler = build_optimizer(wrapped, config, groups)
    return Learner(
        config=config,
        groups=groups,
        chunks=wrapped,
        optimizer=optimizer,
        scheduler=scheduler,
        model=model,
        manifest={},
        domains=names,
        routing=Routing({name: name for name in names}, sources),
        bank=TeacherBank(sources, groups, config.params_dtype, options.length),
    )


def model_samples(options, seed: int) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(seed)
    count = options.micro_batch_size * options.model_microbatches * options.model_steps
    ids = torch.randint(512, (count, options.length), generator=generator).tolist()
    half = options.length // 2
    domains = ["math", "code", "chat", "safety"]
    return [
        Trajectory(
            Prompt("", tuple(row[:half]), domains[i % 4], None, "exact_match", None, i, f"sample {i}"),
            tuple(row[half:]),
            i,
        )
        for i, row in enumerate(ids)
    ]


def model_rank(rank: int, options):
    """Seconds per optimizer step of every rollout batch and kind, and the losses of the first batch."""
    learner = build_learner(options)
    driver, oracle = learner.pipeline, MegatronSchedules(learner.groups)
    weights = [p.detach().clone() for chunk in learner.chunks for p in chunk.parameters()]
    kinds = [*KINDS, "megatron"]
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    losses: dict[str, list[float]] = {}
    timelines = {}
    for repeat in range(1 + options.model_repeats):
        for kind in kinds[repeat % 4 :] + kinds[: repeat % 4]:
            learner.pipeline = oracle if kind == "megatron" else driver
            driver.kind = kind
            if repeat == 0:  # every kind starts from the same weights; later repetitions only measure time
                for parameter, value in zip(
                    (p for chunk in learner.chunks for p in chunk.parameters()), weights
                ):
                    parameter.data.copy_(value)
                learner.optimizer, _ = build_optimizer(learner.chunks, learner.config, learner.groups)
            batches = deque(plan_steps(learner, model_samples(options, repeat)))
            dist.barrier()
            started, reported = time.perf_counter(), []
            while batches:
                reported.append(train_step(learner, batches)["loss"])
                batches.popleft()
            dist.barrier()
            if repeat:
                seconds[kind].append((time.perf_counter() - started) / options.model_steps)
                if kind != "megatron":
                    timelines |= driver.timelines(options.model_steps)
            else:
                losses[kind] = reported
    return seconds, losses, timelines


def model_part(options) -> bool:
    print(
        f"\na real model on 2 stages: {options.layers} layers, width {options.hidden_size}, micro-batches of "
        f"{options.micro_batch_size} x {options.length} tokens, {options.model_microbatches} per step, four "
        f"teachers of the same size, {options.model_steps} optimizer steps per rollout batch; medians of "
        f"{options.model_repeats} rollout batches, schedules alternating\n"
    )
    seconds, losses, timelines = run_ranks(2, model_rank, options)
    same = all(
        abs(a - b) <= 1e-5 * abs(b)
        for kind in losses
        for a, b in zip(losses[kind], losses["megatron"], strict=True)
    )
    base = statistics.median(seconds["back_to_back"])
    print("| schedule | s/step, median | quartiles | to back_to_back |")
    print("|---|---:|---:|---:|")
    for kind, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        print(f"| {kind} | {median:.3f} | {low:.3f} to {high:.3f} | {median / base:.3f} |")
    print(f"\nlosses of all schedules equal: {same}", losses["bubble_fill"])
    if options.picture:
        name = f"model_{os.path.basename(options.picture)}"
        path = os.path.join(os.path.dirname(options.picture), name)
        draw_timeline(timelines, path, unit="seconds")
        print(f"timelines drawn: {path}")
    return same


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("sleep", "model"), help="default: both")
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--microbatches-per-stage", type=int, default=2)
    parser.add_argument("--virtual-stages", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps per rollout batch (sleep)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--unit", type=float, default=0.04, help="seconds of a student forward (sleep)")
    parser.add_argument("--teacher-cost", type=float, default=1.0)
    parser.add_argument("--message", type=int, default=16_384, help="elements of a message (sleep)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument(
        "--model-microbatches", type=int, default=4, help="micro-batches per optimizer step (model)"
    )
    parser.add_argument(
        "--model-steps", type=int, default=4, help="optimizer steps per rollout batch (model)"
    )
    parser.add_argument("--model-repeats", type=int, default=20, help="rollout batches measured per schedule")
    parser.add_argument("--picture", help="path for a picture of the timelines")
    options = parser.parse_args()
    passed = True
    if options.part != "model":
        passed &= sleep_part(options)
    if options.part != "sleep":
        passed &= model_part(options)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
