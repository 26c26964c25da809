"""The cost of the twelfth teacher: step time, device bytes and host bytes with 1, 2, 4 and 12 teachers.

    python benchmarks/teacher_scaling.py [--mode host mmap] [--steps 12]
    torchrun --nproc-per-node 2 benchmarks/teacher_scaling.py --mode host host_sharded mmap
    python benchmarks/teacher_scaling.py --slow-store       # load time hidden behind scoring time
    torchrun --nproc-per-node 2 benchmarks/teacher_scaling.py --heads     # loads of output heads, 2 stages

The same trajectories, in as many domains as the largest count, are scored by 1, 2, 4 or 12 teachers; the
number of scored tokens does not change. Each step has `--samples` trajectories, by default one full
micro-batch of each domain for every rank. Ranks share experts in no layout here, so each is a block with its
own teachers, except that `host_sharded` has all ranks in one block. Results are medians over interleaved
steps, so that other load on the machine affects all counts equally.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
import warnings
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.backend.parallel import build_parallel_groups, select_device, start_ranks
from megatron_mopd.config import Config, ModelConfig, config_from_dict
from megatron_mopd.config.recipes import RECIPES
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.model.build import build_model
from megatron_mopd.teachers.bank import TeacherBank, TeacherSource
from megatron_mopd.teachers.layout import DENSE, HEAD
from megatron_mopd.teachers.routing import Routing
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from megatron_mopd.training.teacher_blocks import with_block_size

VOCAB, SEQUENCE_LENGTH, DOMAINS, MICRO_BATCH = 2000, 64, 12, 4
MODEL = dict(
    num_layers=4,
    hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=256,
    num_moe_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=64,
    moe_aux_loss_coeff=0.0,
)

STUDENT = ModelConfig(vocab_size=VOCAB, transformer=MODEL)


class SlowStore:
    """Wraps a store so that bodies take `seconds` longer to load (a head is a small part of a real model)."""

    def __init__(self, store, seconds: float):
        self._store, self._seconds = store, seconds

    def __getattr__(self, name):
        return getattr(self._store, name)

    def begin(self, key, destination):
        rest = self._store.begin(key, destination)
        if key[1] != DENSE:
            return rest

        def slowly() -> None:
            time.sleep(self._seconds)
            rest()

        return slowly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", nargs="+", default=["host"], help="host, host_sharded or mmap, or several")
    parser.add_argument("--dtype", default=None, help="storage format: int8 or fp8")
    parser.add_argument("--teachers", type=int, nargs="+", default=[1, 2, 4, 12])
    parser.add_argument("--steps", type=int, default=12, help="measured steps for each number of teachers")
    parser.add_argument("--samples", type=int, default=None, help="trajectories of a step, on all ranks")
    parser.add_argument("--slow-store", action="store_true", help="measure slow loads instead")
    parser.add_argument("--heads", action="store_true", help="count the loads of output heads instead")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    device = select_device("auto")
    start_ranks(device, 10)
    with tempfile.TemporaryDirectory() as name:
        directory = [name]
        dist.broadcast_object_list(directory)  # the files of `mmap` are shared
        groups = None
        if options.heads:
            options.mode = []
            count_heads(directory[0], max(options.teachers), device)
        for mode in options.mode:
            config = configuration(directory[0], mode, options.dtype)
            groups = groups or build_parallel_groups(config.parallel, device, seed=1)
            blocks = with_block_size(config, STUDENT, dist.get_world_size(), ranks_per_host=None)
            path, block = Path(directory[0]) / mode, replace(groups, config=blocks)
            learners = {n: learner(config, block, n, path / str(n)) for n in options.teachers}
            if options.slow_store:
                slow_store(learners[max(learners)])
            else:
                scaling(learners, mode, options)
        dist.barrier()
    dist.destroy_process_group()


def configuration(
    directory: str, mode: str, dtype: str | None, kind: str = "full_vocab_kl", stages: int = 1
) -> Config:
    return config_from_dict(
        {
            "run_dir": directory,
            "objective": {"kind": kind},
            "parallel": {"pipeline_model_parallel_size": stages},
            "schedule": {
                "global_batch_size": DOMAINS * MICRO_BATCH * dist.get_world_size(),
                "micro_batch_size": MICRO_BATCH,
            },
            "teacher_storage": {"mode": mode, "dtype": dtype},
            "optimizer": {"use_distributed_optimizer": False},
        }
    )


def learner(
    config, groups, teachers: int, directory: Path, sequence_length: int = SEQUENCE_LENGTH
) -> Learner:
    model = STUDENT
    chunks = build_model(model, groups, config.params_dtype, max_sequence_length=sequence_length, seed=1)
    sources = [TeacherSource(f"teacher{k}", model, 10 + k, f"{k}") for k in range(teachers)]
    routing = Routing({f"domain{d:02d}": f"teacher{d % teachers}" for d in range(DOMAINS)}, sources)
    wrapped = wrap_data_parallel(chunks, config, groups)
    optimizer, scheduler = build_optimizer(wrapped, config, groups)
    bank = TeacherBank(
        sources, groups, config.params_dtype, sequence_length, config.teacher_storage, directory=directory
    )
    domains = [f"domain{d:02d}" for d in range(DOMAINS)]
    return Learner(config, groups, wrapped, optimizer, scheduler, model, {}, domains, routing, bank)


def trajectories(seed: int, samples: int | None = None) -> list[Trajectory]:
    """Trajectories of 48 tokens, half of them response: by default one micro-batch per domain and rank."""
    rng = random.Random(seed)
    result = []
    for index in range(samples or DOMAINS * MICRO_BATCH * dist.get_world_size()):
        ids = [rng.randrange(VOCAB) for _ in range(48)]
        domain = f"domain{index % DOMAINS:02d}"
        prompt = Prompt("", tuple(ids[:24]), domain, None, "exact_match", None, index, "")
        result.append(Trajectory(prompt, tuple(ids[24:]), index, logprobs=(-8.0,) * 24))
    return result


def one_step(item: Learner, seed: int, samples: int | None = None) -> tuple[float, dict[str, float]]:
    batch = plan_step(item, trajectories(seed, samples))
    dist.barrier()
    started = time.perf_counter()
    metrics = train_step(item, [batch])
    return time.perf_counter() - started, metrics


def scaling(learners: dict[int, Learner], mode: str, options) -> None:
    times: dict[int, list[float]] = {n: [] for n in learners}
    metrics: dict[int, dict[str, float]] = {}
    for step in range(options.steps + 2):
        for n, item in learners.items():
            seconds, metrics[n] = one_step(item, step, options.samples)
            if step >= 2:  # the first steps build tables and caches
                times[n].append(seconds)
    if dist.get_rank() == 0:
        first = min(learners)
        print(f"{mode}, {options.dtype or 'float32'}, {dist.get_world_size()} ranks")
        print("teachers  step (ms)  ratio  device bytes  host bytes  predicted  loads/step  hidden")
        for n, item in learners.items():
            # Paired ratios: the two steps of a pair run one after the other.
            ratio = statistics.median(a / b for a, b in zip(times[n], times[first]))
            loads = sum(value for key, value in metrics[n].items() if key.endswith("/loads"))
            predicted = item.bank.host_bytes_by_mode()[mode]
            hidden = [value for key, value in metrics[n].items() if key.endswith("/load_hidden")]
            share = f"{statistics.mean(hidden):6.2f}" if hidden else "     -"
            step, bank = 1e3 * statistics.median(times[n]), item.bank
            sizes = f"{bank.device_bytes():12d}  {bank.host_bytes():10d}  {predicted:9d}"
            print(f"{n:8d}  {step:9.1f}  {ratio:5.3f}  {sizes}  {loads:10.0f}  {share}", flush=True)


class HeadCount:
    """Watches a bank's output heads: what starts their loads, and which loads are never read."""

    def __init__(self, bank: TeacherBank):
        self._begin, self._heads, self._reading = bank.store.begin, bank.heads, False
        self.arrivals: list[tuple[str, bool]] = []
        """(teacher, whether the computation that reads the head started the load)"""
        self.read: set[int] = set()
        """Indices into `arrivals`."""
        bank.store.begin, bank.heads = self._counted, self._watched

    def _counted(self, key, destination):
        if key[1] == HEAD:
            self.arrivals.append((key[0], self._reading))
        return self._begin(key, destination)

    def _watched(self, names):
        self._reading = True
        result = self._heads(names)
        self._reading = False
        self.read |= {
            max(i for i, (name, _) in enumerate(self.arrivals) if name == wanted) for wanted in names
        }
        return result


def count_heads(directory: str, teachers: int, device: torch.device) -> None:
    """Loads of output heads on the last stage in four steps: those started ahead of their use, those started
    by the computation that reads the head (and waits), and how many of all these are never read."""
    stages = dist.get_world_size()
    is_last = dist.get_rank() == stages - 1
    if is_last:
        print("recipe             ahead  by the reader  never read", flush=True)
    groups = None
    for recipe in RECIPES:
        config = configuration(directory, "host", None, RECIPES[recipe]["objective"]["kind"], stages)
        groups = groups or build_parallel_groups(config.parallel, device, seed=1)
        item = learner(config, groups, teachers, Path(directory) / recipe)
        count = HeadCount(item.bank)
        batches = deque(plan_step(item, trajectories(step)) for step in range(4))
        while batches:
            train_step(item, batches)
            batches.popleft()
        if is_last:
            late = sum(by_reader for _, by_reader in count.arrivals)
            unread = len(count.arrivals) - len(count.read)
            print(f"{recipe:17}  {len(count.arrivals) - late:5d}  {late:13d}  {unread:10d}", flush=True)


def slow_store(item: Learner) -> None:
    """Measure loads that take 0.25, 0.5, 0.8 and 1.5 times as long as a teacher's scoring."""
    plain = item.bank.store
    for _ in range(2):
        _, metrics = one_step(item, 0)
    scoring = statistics.mean(v for key, v in metrics.items() if key.endswith("/score_seconds"))
    base = statistics.median(one_step(item, step)[0] for step in range(6))
    print(f"scoring {1e3 * scoring:.1f} ms per teacher, step {1e3 * base:.0f} ms")
    print("load / scoring time     step (ms)  hidden share of loading")
    for share in (0.25, 0.5, 0.8, 1.5):
        item.bank.store = SlowStore(plain, share * scoring)
        runs = [one_step(item, step) for step in range(6)]
        hidden = statistics.mean(
            value for _, metrics in runs[1:] for key, value in metrics.items() if key.endswith("/load_hidden")
        )
        step = statistics.median(seconds for seconds, _ in runs[1:])
        print(f"{share:22.2f}  {1e3 * step:9.0f}  {hidden:23.2f}")
    item.bank.store = plain


if __name__ == "__main__":
    main()
