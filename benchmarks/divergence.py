"""The cost of the full-vocabulary loss relative to the head's own matrix products: time, memory, TP traffic.

    torchrun --nproc-per-node 2 benchmarks/divergence.py                # CPU, TP2, one thread a rank
    torchrun --nproc-per-node 2 benchmarks/divergence.py --tokens 256 --vocab 4096 --hidden 128   # seconds
    python benchmarks/divergence.py --device cuda --dtype bfloat16 --hidden 4096 --vocab 151936 --chunk 4096

Every method runs forward and backward of reverse KL between two heads, to the gradients of the student's
hidden states and weight:

    GEMMs    the four bare head products, chunk by chunk: student and teacher logits, both student gradients
    ours     linear_kl
    gather   all-gather both logits, then log-softmax over the whole vocabulary (a)
    unfused  vocab-parallel log-softmax in autograd over the whole block of logits (b)

Time is per rank, the median of the repeats: `wall`, and `cpu`, the process's own CPU seconds, which are less
sensitive to other load on the machine; ratios are within one repeat. Memory is the allocator's peak on top of
the inputs and the two gradients that every method returns. Traffic is the payload of collectives, forward and
total, per token; `forward` excludes the sum of the hidden gradient, which any vocab-parallel head needs.
"""

import argparse
import gc
import os
import statistics
import time
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_mopd.objectives import linear_kl


class CountCollectives:
    """Context that counts calls and payload bytes of `torch.distributed` collectives."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")

    def __enter__(self):
        self.calls = []  # (name, payload bytes of this rank, shape)
        self._originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self._originals.items():
            setattr(dist, name, partial(self._record, name, original))
        return self

    def __exit__(self, *exception):
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _record(self, name, original, *args, **kwargs):
        payload = args[1] if name.startswith(("all_gather", "reduce_scatter")) else args[0]
        self.calls.append((name, payload.numel() * payload.element_size(), tuple(payload.shape)))
        return original(*args, **kwargs)

    def bytes(self):
        return sum(size for _, size, _ in self.calls)

    def bytes_beyond_head(self, hidden_size):
        """Payload bytes without the sums of hidden gradients [c, h]; the losses' own tensors are flat or have
        few rows."""
        return sum(
            size for _, size, shape in self.calls if not (shape[1:] == (hidden_size,) and shape[0] > 3)
        )


def memory_use(function, device):
    """(peak bytes, retained bytes) that `function()` allocates in addition to what is already allocated.

    Retained bytes are those that its result holds, so `function` must return everything that stays alive.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        del result
        return torch.cuda.max_memory_allocated() - before, kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = profiler.profiler.kineto_results.events()
    del result
    peak = current = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        current += size
        peak = max(peak, current)
    return peak, current


class _SumReplicated(torch.autograd.Function):
    """All-reduce of a value that every rank then uses identically (the loss): the gradient passes through."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        tensor = tensor.clone()
        if group is not None:
            dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SumShared(_SumReplicated):
    """All-reduce of a value that each rank uses in its own columns (a normalizer): their gradients are
    summed."""

    @staticmethod
    def backward(ctx, grad):
        return _SumBackward.backward(ctx, grad)


class _SumBackward(torch.autograd.Function):
    """Identity whose backward all-reduces: the entry of a column-parallel head."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor

    @staticmethod
    def backward(ctx, grad):
        if ctx.group is not None:
            grad = grad.clone()
            dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Gather(torch.autograd.Function):
    """[T, V/tp] -> [T, V]; backward: this rank's slice, without summing the ranks' equal losses."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.rank, ctx.columns = (0 if group is None else dist.get_rank(group)), tensor.shape[1]
        if group is None:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor, group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad):
        return grad[:, ctx.rank * ctx.columns :][:, : ctx.columns], None


def ours(inputs, group, chunk):
    hidden, weight, teacher_hidden, teacher_weight, token_weight = inputs
    loss, _ = linear_kl(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        token_weight=token_weight,
        group=group,
        chunk_size=chunk,
    )
    return loss


def gather(inputs, group, chunk):
    hidden, weight, teacher_hidden, teacher_weight, token_weight = inputs
    log_p = _Gather.apply(_SumBackward.apply(hidden, group) @ weight.t(), group).float().log_softmax(-1)
    with torch.no_grad():
        log_q = _Gather.apply(teacher_hidden @ teacher_weight.t(), group).float().log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * token_weight).sum()


def unfused(inputs, group, chunk):
    hidden, weight, teacher_hidden, teacher_weight, token_weight = inputs

    def log_softmax(logits):
        maximum = logits.detach().amax(-1, keepdim=True)
        if group is not None:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - maximum
        return shifted - _SumShared.apply(shifted.exp().sum(-1, keepdim=True), group).log()

    log_p = log_softmax((_SumBackward.apply(hidden, group) @ weight.t()).float())
    with torch.no_grad():
        log_q = log_softmax((teacher_hidden @ teacher_weight.t()).float())
    return (_SumReplicated.apply((log_p.exp() * (log_p - log_q)).sum(-1), group) * token_weight).sum()


def bare_gemms(inputs, group, chunk):
    """The four products alone, in the same chunks, with results summed where needed."""
    hidden, weight, teacher_hidden, teacher_weight, _ = inputs
    with torch.no_grad():
        logits = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            out = logits[: len(hidden[rows])]
            torch.mm(teacher_hidden[rows], teacher_weight.t(), out=out)
            torch.mm(hidden[rows], weight.t(), out=out)
            torch.mm(out, weight, out=hidden_grad[rows])
            weight_grad.addmm_(out.t(), hidden[rows])


def make_inputs(tokens, args, device, tp, rank):
    """Hidden states [T, h], equal on all ranks, weights [V/tp, h] (the student's require gradients), token
    weights 1/T."""
    dtype = getattr(torch, args.dtype)
    shared = torch.Generator(device).manual_seed(0)
    own = torch.Generator(device).manual_seed(1 + rank)
    hidden, teacher_hidden = (
        torch.randn(tokens, args.hidden, generator=shared, device=device, dtype=dtype) for _ in range(2)
    )
    weight, teacher_weight = (
        torch.randn(args.vocab // tp, args.hidden, generator=own, device=device, dtype=dtype)
        * args.hidden**-0.5
        for _ in range(2)
    )
    token_weight = torch.full((tokens,), 1 / tokens, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, token_weight


def run_once(method, inputs, group, chunk):
    """Forward and backward; returns (loss, collectives of the forward, of both)."""
    inputs[0].grad = inputs[1].grad = None
    with CountCollectives() as collectives:
        loss = method(inputs, group, chunk)
        forward = collectives.bytes_beyond_head(inputs[0].shape[1])
        if loss is not None:
            loss.backward()
    return loss, forward, collectives.bytes()


def timed(method, inputs, group, chunk, device):
    """(wall seconds, CPU seconds) of one run, with all ranks starting together."""
    if group is not None:
        dist.barrier(group)
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    run_once(method, inputs, group, chunk)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


class Cost(NamedTuple):
    wall: float  # relative to the bare GEMMs
    cpu: float
    memory: int  # bytes
    forward_bytes: float  # per token


def measure(tokens, methods, args, device, group, tp, rank):
    """Print a table for `tokens` tokens and return {method name: Cost}."""
    inputs = make_inputs(tokens, args, device, tp, rank)
    gradients = sum(x.numel() * x.element_size() for x in inputs[:2])
    times = {name: [] for name in methods}
    for repeat in range(args.repeats + (device.type == "cuda")):
        for name, method in methods.items():
            sample = timed(method, inputs, group, args.chunk, device)
            if device.type != "cuda" or repeat > 0:  # the first run on CUDA tunes the kernels
                times[name].append(sample)
    results, reference = {}, None
    for name, method in methods.items():
        loss, forward, total = run_once(method, inputs, group, args.chunk)
        if name == "ours":
            reference = [x.detach().clone() for x in (loss, inputs[0].grad, inputs[1].grad)]
        elif loss is not None:
            for got, want in zip((loss, inputs[0].grad, inputs[1].grad), reference):
                assert (got.float() - want.float()).norm() <= 2e-2 * want.float().norm(), f"{name} disagrees"
        del loss
        inputs[0].grad = inputs[1].grad = None
        peak, _ = memory_use(partial(run_once, method, inputs, group, args.chunk), device)
        wall, cpu = (statistics.median(sample[i] for sample in times[name]) for i in range(2))
        ratios = [
            statistics.median(mine[i] / bare[i] for mine, bare in zip(times[name], times["GEMMs"]))
            for i in range(2)
        ]
        results[name] = Cost(*ratios, peak - gradients, forward / tokens)
        if rank == 0:
            print(
                f"{tokens:6d} {name:8s}"
                f"   wall {wall:8.3f} s {ratios[0]:5.2f} x   cpu {cpu:8.3f} s {ratios[1]:5.2f} x"
                f"   memory {(peak - gradients) / 2**20:8.1f} MiB"
                f"   TP bytes per token: forward {forward / tokens:9.2f} total {total / tokens:9.2f}",
                flush=True,
            )
    return results


def print_targets(results, time_target):
    """Print the targets of `linear_kl` and its results, at the largest number of tokens measured."""
    few, many = min(results), max(results)
    cost = results[many]["ours"]
    print(f"linear_kl at {many} tokens:")
    print(f"  time over the GEMMs': {cost.wall:.2f} wall, {cost.cpu:.2f} cpu; target at most {time_target}")
    if "unfused" in results[many]:
        share = cost.memory / results[many]["unfused"].memory
        print(f"  peak memory over unfused's: {share:.3f}; target at most 0.1")
    if few < many:
        growth = cost.memory / results[few]["ours"].memory
        print(f"  peak memory over that at {few} tokens: {growth:.3f}; target 0.95 to 1.05")
    print(
        f"  TP bytes per token in the forward, beyond the head's: {cost.forward_bytes:.2f}; target at most 32"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--beside", nargs="*", default=["gather", "unfused"], help="methods to compare with")
    parser.add_argument(
        "--gather-tokens",
        type=int,
        default=2048,
        help="gather runs up to here: it takes 30 bytes x T x V per rank",
    )
    args = parser.parse_args()

    tp, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    group = None
    if tp > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        group = dist.group.WORLD
    if rank == 0:
        print(
            f"V={args.vocab} h={args.hidden} chunk={args.chunk} {args.dtype} {device.type} TP{tp}, per rank"
        )
    methods = {"GEMMs": bare_gemms, "ours": ours, **{name: globals()[name] for name in args.beside}}
    results = {}
    for tokens in args.tokens:
        chosen = {k: v for k, v in methods.items() if k != "gather" or tokens <= args.gather_tokens}
        results[tokens] = measure(tokens, chosen, args, device, group, tp, rank)
    if rank == 0:
        print_targets(results, 1.15 if device.type == "cuda" else 1.25)
    if tp > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
