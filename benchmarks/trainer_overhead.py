"""The trainer's overhead over megatron-core: our optimizer step compared with a bare loop on the same model.

    python benchmarks/trainer_overhead.py [--repeats 15] [--kind full_vocab_kl]
    torchrun --nproc-per-node 2 benchmarks/trainer_overhead.py parallel.pipeline_model_parallel_size=2

Ours: `plan_step` and `train_step`, everything from a list of trajectories to the step's metrics: splitting
and collating the batch, planning the pipeline, teachers from the bank, hidden states cached on the host,
per-domain metrics, the optimizer. Bare: megatron-core's schedule, gradient finalisation and optimizer, and
nothing else: tensors are collated beforehand, the teacher is already resident and its hidden states stay in
place, and the head and the loss are called directly.

Both run in this process on the same weights, one after the other in alternating order; the median of the
ratios of all pairs is printed. The target is at most 1.05.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.backend.parallel import build_parallel_groups, select_device, start_ranks
from megatron_mopd.config import ModelConfig, config_from_dict
from megatron_mopd.data.batching import MicroBatch
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.model.build import build_model
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.objectives import linear_kl
from megatron_mopd.objectives.linear_cross_entropy import linear_cross_entropy
from megatron_mopd.teachers.bank import TeacherBank, TeacherSource
from megatron_mopd.teachers.routing import Routing
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step

VOCAB = 2048
STUDENT = dict(
    num_layers=4,
    hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=512,
    qk_layernorm=True,
    num_moe_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=256,
    moe_router_load_balancing_type="none",
)
PROMPT, RESPONSE = 32, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("sft", "full_vocab_kl"), default="full_vocab_kl")
    parser.add_argument("--batch", type=int, default=16, help="trajectories per step")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15, help="timed pairs of steps")
    parser.add_argument("--schedule", default="bubble_fill", help="schedule.kind of our step")
    parser.add_argument("layout", nargs="*", help="for example parallel.expert_model_parallel_size=2")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    learner = make_learner(arguments)
    trajectories = make_batch(arguments.batch)
    bare = BareLoop(learner, trajectories)

    def ours() -> None:
        train_step(learner, [plan_step(learner, trajectories)])

    for _ in range(3):  # allocators, and the costs that the pipeline's planner measures
        ours()
        bare.step()
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for pair in range(arguments.repeats):
        steps = [("ours", ours), ("bare", bare.step)]
        for name, step in steps if pair % 2 else reversed(steps):
            seconds[name].append(timed(step, learner.groups.device))
    if dist.get_rank() == 0:
        report(arguments, seconds)
    dist.destroy_process_group()


def make_learner(arguments: argparse.Namespace) -> Learner:
    layout = {}
    for item in arguments.layout:
        key, value = item.removeprefix("parallel.").split("=")
        layout[key] = value == "true" if value in ("true", "false") else int(value)
    config = config_from_dict(
        {
            "run_dir": "unused",
            "parallel": layout,
            "objective": {"kind": arguments.kind},
            "schedule": {
                "micro_batch_size": arguments.micro_batch,
                "global_batch_size": arguments.batch,
                "kind": arguments.schedule,
            },
        }
    )
    device = select_device("auto")
    start_ranks(device, timeout_minutes=1)
    groups = build_parallel_groups(config.parallel, device, seed=1)
    student, length = ModelConfig(vocab_size=VOCAB, transformer=STUDENT), PROMPT + RESPONSE
    chunks = build_model(student, groups, config.params_dtype, max_sequence_length=length, seed=1)
    bank = routing = None
    if arguments.kind != "sft":
        sources = [TeacherSource("expert", student, seed=2)]
        bank = TeacherBank(sources, groups, config.params_dtype, length, config.teacher_storage)
        routing = Routing({"default": "expert"}, sources)
    wrapped = wrap_data_parallel(chunks, config, groups)
    optimizer, scheduler = build_optimizer(wrapped, config, groups)
    return Learner(
        config=config,
        groups=groups,
        chunks=wrapped,
        optimizer=optimizer,
        scheduler=scheduler,
        model=student,
        manifest={},
        domains=["-"],
        routing=routing,
        bank=bank,
    )


def make_batch(count: int) -> list[Trajectory]:
    """Trajectories of equal length, so that neither loop computes on padding."""
    rng = random.Random(0)
    trajectories = []
    for index in range(count):
        prompt = Prompt("", tuple(rng.choices(range(VOCAB), k=PROMPT)), "-", None, "-", None, index, "")
        trajectories.append(Trajectory(prompt, tuple(rng.choices(range(VOCAB), k=RESPONSE)), index))
    return trajectories


class BareLoop:
    """Forward, backward and optimizer step with megatron-core alone, on the learner's model and batch."""

    def __init__(self, learner: Learner, trajectories: list[Trajectory]):
        self.learner, self.groups = learner, learner.groups
        batch = plan_step(learner, trajectories)
        self.micro_batches = [micro_batch.to(self.groups.device) for micro_batch in batch.student]
        self.teacher_hidden: list[torch.Tensor] = []
        self.schedule = get_forward_backward_func()

    def step(self) -> None:
        learner = self.learner
        for chunk in learner.chunks:
            chunk.zero_grad_buffer()
        learner.optimizer.zero_grad()
        if learner.bank is not None:
            self.teacher_hidden = []
            teacher = learner.bank.make_resident("expert")
            with torch.no_grad():
                self._run([teacher], self._keep, forward_only=True)
        self._run(learner.chunks, self._loss, forward_only=False)
        learner.optimizer.step()
        learner.scheduler.step(increment=1)

    def _run(self, chunks, loss, forward_only: bool) -> None:
        def forward_step(numbered, chunk):
            number, micro_batch = next(numbered)
            output = chunk(micro_batch.tokens, micro_batch.position_ids, None)
            return output, lambda hidden: loss(number, micro_batch, hidden)

        iterators = [iter(enumerate(self.micro_batches)) for _ in chunks]
        self.schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(self.micro_batches),
            seq_length=self.micro_batches[0].tokens.size(1),
            micro_batch_size=self.micro_batches[0].tokens.size(0),
            forward_only=forward_only,
        )

    def _rows(self, micro_batch: MicroBatch, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.flatten(0, 1)[micro_batch.loss_index]

    def _keep(self, number: int, micro_batch: MicroBatch, hidden: torch.Tensor):
        self.teacher_hidden.append(self._rows(micro_batch, hidden))
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int, device=hidden.device), {}

    def _loss(self, number: int, micro_batch: MicroBatch, hidden: torch.Tensor):
        rows = self._rows(micro_batch, hidden)
        head = unwrap(self.learner.chunks[-1]).head_weight()
        arguments = dict(
            token_weight=torch.ones(len(rows), device=rows.device),
            group=self.groups.tp,
            vocab_size=VOCAB,
            chunk_size=self.learner.config.objective.chunk_size,
        )
        if self.learner.bank is None:
            loss, _ = linear_cross_entropy(rows, head, micro_batch.target_ids, **arguments)
        else:
            (teacher_head,) = self.learner.bank.heads(["expert"])
            loss, _ = linear_kl(rows, head, self.teacher_hidden[number], teacher_head, **arguments)
        return loss, torch.tensor(len(rows), dtype=torch.int, device=rows.device), {}


def timed(step, device: torch.device) -> float:
    """Seconds of one step on the slowest rank. One barrier, one all-reduce of one float64."""
    dist.barrier()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    longest = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.item()


def report(arguments: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds["bare"]))
    low, middle, high = statistics.quantiles(ratios, n=4)
    tokens = arguments.batch * (PROMPT + RESPONSE)
    print(
        f"{arguments.kind}, {arguments.schedule}, {dist.get_world_size()} ranks, "
        f"{' '.join(arguments.layout) or 'data parallel'}: {arguments.batch} trajectories, {tokens} tokens, "
        f"micro-batches of {arguments.micro_batch}, {arguments.repeats} pairs"
    )
    for name, values in seconds.items():
        print(f"  {name:5} median {statistics.median(values):.3f} s, fastest {min(values):.3f} s")
    print(f"  ours / bare: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}; target at most 1.05")


if __name__ == "__main__":
    main()
