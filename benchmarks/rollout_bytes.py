"""Handing over a rollout batch: bytes that a rank receives, its seconds, and its memory in Python.

    python benchmarks/rollout_bytes.py [--ranks 8 32 128 512] [--real 2 4] [--responses 8] [--mean 512]

"now": the ranks share how each response ended (`share_endings`), and the tokens travel to the rank that
trains on them (`deliver_tokens`). "before" is what the trainer did earlier, kept here: every token is
all-gathered, with its log-prob, as a pair of float64, and becomes a Python int and a Python float on every
rank. Every rank samples `--responses` responses of log-normal lengths (sigma 1, at most eight times the
mean), and trains on as many others.

Real ranks are processes on this machine, connected by gloo. A simulated rank is rank 0 of a world that does
not exist (torch's fake process group, which sends nothing); what it would receive is replaced by numbers of
the right size, so its seconds are those of one rank's own work, without the network. Bytes are in both cases
those of the collectives' buffers, without the rank's own part; a ring gives 2 (n - 1) / n of an all-reduce.
Peak memory is Python's and numpy's (tracemalloc, in a second pass, because it takes time), objects are blocks
of Python's allocator that the batch keeps occupied.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend "fake")
from torch import Tensor

from megatron_mopd.data.exchange import deliver_tokens, share_endings
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory, sum_of

CPU = torch.device("cpu")
PROMPT = Prompt("", range(100), "-", None, "none")
_BYTES_PER_PAIR = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 32, 128, 512], help="simulated")
    parser.add_argument("--real", type=int, nargs="*", default=[2, 4], help="on this machine")
    parser.add_argument("--responses", type=int, default=8, help="sampled by each rank")
    parser.add_argument("--mean", type=int, default=512, help="of the responses' lengths, in tokens")
    options = parser.parse_args()
    print(f"{options.responses} responses of {options.mean} tokens on average sampled by each rank")
    print("bytes: received by rank 0; its tokens: those that it trains on, 8 bytes each")
    columns = f"{'bytes':>13} {'seconds':>7} {'peak MB':>8} {'objects':>10}"
    print(f"{'':15} | {'':10} | {'now':41} | before")
    print(f"{'ranks':15} | its tokens | {columns} | {columns}")
    for is_real, sizes in ((True, options.real), (False, options.ranks)):
        for ranks in sizes:
            lengths = draw_lengths(ranks * options.responses, options.mean)
            costs = [run(way, ranks, lengths, is_real) for way in ("now", "before")]
            name = f"{ranks} {'real' if is_real else 'simulated'}"
            print(f"{name:15} | {costs[0].own_bytes:10,} | {costs[0]} | {costs[1]}", flush=True)


@dataclass(frozen=True)
class Cost:
    """What handing over a batch costs rank 0."""

    own_bytes: int
    """Of the tokens that it trains on."""
    received: int
    seconds: float
    peak: int
    objects: int

    def __str__(self) -> str:
        return f"{self.received:13,} {self.seconds:7.3f} {self.peak / 1e6:8.1f} {self.objects:10,}"


def draw_lengths(count: int, mean: int) -> np.ndarray:
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(drawn, 1, 8 * mean).astype(int)


def run(way: str, ranks: int, lengths: np.ndarray, is_real: bool) -> Cost:
    """The cost of one way, in processes of its own: one for every real rank, one for a simulated one."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        receiver, sender = context.Pipe(duplex=False)
        processes = [
            context.Process(target=_rank, args=(rank, ranks, way, lengths, is_real, Path(directory), sender))
            for rank in range(ranks if is_real else 1)
        ]
        for process in processes:
            process.start()
        sender.close()
        try:
            return receiver.recv()
        finally:
            for process in processes:
                process.join()


def _rank(rank: int, ranks: int, way: str, lengths, is_real: bool, directory: Path, sender) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), ranks) if is_real else dist.HashStore()
    dist.init_process_group("gloo" if is_real else "fake", store=store, rank=rank, world_size=ranks)
    hand_over = {"now": Now, "before": Before}[way](rank, ranks, lengths, is_real)
    cost = measure(hand_over)
    if is_real:
        dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        sender.send(cost)


def measure(hand_over: Now | Before) -> Cost:
    gc.collect()
    before, began = sys.getallocatedblocks(), time.perf_counter()
    kept = hand_over()
    seconds, received = time.perf_counter() - began, hand_over.received
    gc.collect()
    objects = sys.getallocatedblocks() - before
    del kept
    gc.collect()
    tracemalloc.start()
    hand_over()
    peak = tracemalloc.get_traced_memory()[1]
    return Cost(hand_over.own_bytes, received, seconds, peak, objects)


class Now:
    """Arrays: shared endings, and tokens to the rank that trains on them."""

    def __init__(self, rank: int, ranks: int, lengths: np.ndarray, is_real: bool):
        self._rank, self._ranks, self._lengths, self._is_real = rank, ranks, lengths.tolist(), is_real
        rng = np.random.default_rng(rank)
        self._ids = {i: rng.integers(300, 150_000, n, dtype=np.int32) for i, n in self._sampled(rank)}
        self._logprobs = {i: -rng.random(n, dtype=np.float32) for i, n in self._sampled(rank)}
        # Every rank trains on the samples of another one.
        self._wanted = [[i for i, _ in self._sampled((to + 1) % ranks)] for to in range(ranks)]
        self.own_bytes = 8 * sum(self._lengths[i] for i in self._wanted[rank])
        self.received = 0

    def _sampled(self, rank: int) -> list[tuple[int, int]]:
        indices = range(rank, len(self._lengths), self._ranks)
        return [(index, self._lengths[index]) for index in indices]

    def __call__(self) -> list[Trajectory]:
        lengths, group = self._lengths, dist.group.WORLD
        mine = {i: (len(ids), True, sum_of(self._logprobs[i])) for i, ids in self._ids.items()}
        endings = share_endings(mine, len(lengths), group, CPU)
        if not self._is_real:
            endings = [(length, True, -0.5 * length) for length in lengths]
        batch = [
            Trajectory(
                PROMPT,
                self._ids.get(i),
                i,
                self._logprobs.get(i),
                is_finished,
                response_length=length,
                logprob_sum=total,
                sampled_by=i % self._ranks,
            )
            for i, (length, is_finished, total) in enumerate(endings)
        ]
        with counted_all_to_all() as received:
            delivered = deliver_tokens(batch, self._wanted, group, CPU, np.dtype(np.float32))
        shared = 16 * len(lengths) * 2 * (self._ranks - 1) // self._ranks
        self.received = shared + sum(received)
        assert sum(t.response_length * 8 for t in delivered if t.has_tokens) == self.own_bytes
        return delivered


class counted_all_to_all:
    """Context in which the bytes that this rank receives from others in all-to-alls are listed."""

    def __enter__(self) -> list[int]:
        self._original, received = dist.all_to_all_single, []

        def counted(output: Tensor, given: Tensor, output_split_sizes: Sequence[int], **options):
            others = sum(output_split_sizes) - output_split_sizes[dist.get_rank()]
            received.append(others * output.element_size())
            return self._original(output, given, output_split_sizes=output_split_sizes, **options)

        dist.all_to_all_single = counted
        return received

    def __exit__(self, *exception) -> None:
        dist.all_to_all_single = self._original


class OldTrajectory(NamedTuple):
    prompt: Prompt
    response_ids: tuple[int, ...]
    index: int
    logprobs: tuple[float, ...]
    finished: bool


class Before:
    """The earlier way: two all-gathers of everything, padded to the largest share; a tuple per response."""

    def __init__(self, rank: int, ranks: int, lengths: np.ndarray, is_real: bool):
        self._ranks, self._is_real = ranks, is_real
        self._shares = [lengths[of::ranks].tolist() for of in range(ranks)]
        rng = np.random.default_rng(rank)
        self._mine = [
            (tuple(rng.integers(300, 150_000, n).tolist()), tuple((-rng.random(n)).tolist()))
            for n in self._shares[rank]
        ]
        self.own_bytes = 8 * sum(self._shares[(rank + 1) % ranks])
        self.received = 0

    def __call__(self) -> list[OldTrajectory]:
        self.received = 0
        endings = torch.tensor([(len(ids), True) for ids, _ in self._mine], dtype=torch.long).view(-1, 2)
        tokens = [pair for ids, logprobs in self._mine for pair in zip(ids, logprobs, strict=True)]
        values = torch.tensor(tokens, dtype=torch.double).view(-1, 2)
        all_endings = self._all_gather(endings, max(map(len, self._shares)), self._endings)
        most = int(all_endings[..., 0].sum(dim=1).max())
        all_values = self._all_gather(values, most, lambda shape: 300 + 100_000 * torch.rand(shape).double())
        batch = []
        for rank, (endings, values) in enumerate(zip(all_endings.tolist(), all_values.tolist(), strict=True)):
            start = 0
            for place, (length, finished) in enumerate(endings):
                ids, logprobs = zip(*values[start : start + length], strict=True)
                index = rank + place * self._ranks
                batch.append(OldTrajectory(PROMPT, tuple(map(int, ids)), index, logprobs, bool(finished)))
                start += length
        return sorted(batch, key=lambda trajectory: trajectory.index)

    def _endings(self, shape: Sequence[int]) -> Tensor:
        lengths = torch.tensor(self._shares)
        return torch.stack((lengths, torch.ones_like(lengths)), dim=2)

    def _all_gather(self, rows: Tensor, most: int, simulated: Callable[[Sequence[int]], Tensor]) -> Tensor:
        padded = torch.zeros((most, 2), dtype=rows.dtype)
        padded[: len(rows)] = rows
        gathered = padded.new_empty((self._ranks, most, 2))
        dist.all_gather(list(gathered.unbind(0)), padded)
        self.received += (self._ranks - 1) * most * _BYTES_PER_PAIR
        return gathered if self._is_real else simulated(gathered.shape)


if __name__ == "__main__":
    main()
