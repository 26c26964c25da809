"""Peak memory and speed of the converters, on a synthetic checkpoint of several gigabytes.

    python benchmarks/convert_memory.py [--gigabytes 4.2] [--ranks 1 2 4] [--work DIR]

Writes a random mixture-of-experts model (Qwen3-MoE, bfloat16, files of at most 1 GB), converts it to Megatron
and back on each number of ranks, and prints each rank's peak resident memory with its limit of (parameters /
ranks) x bytes + twice the largest tensor + 1 GB, and the time compared with a plain copy of the files. The
result is compared with the original bit by bit. All files are removed at the end.
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.backend.parallel import start_ranks
from megatron_mopd.config import ModelConfig
from megatron_mopd.model.convert import open_checkpoint, write_hugging_face, write_megatron
from megatron_mopd.model.families import FAMILIES
from megatron_mopd.model.weight_source import Companions, WeightSource

HIDDEN, EXPERT_FFN, EXPERTS, VOCAB = 2048, 1024, 32, 65536
GB = 10**9


class RandomModel(WeightSource):
    """A mixture-of-experts model with about `num_bytes` of random bfloat16 weights."""

    def __init__(self, num_bytes: float):
        per_layer = EXPERTS * 3 * HIDDEN * EXPERT_FFN * 2
        transformer = dict(
            num_layers=max(2, round((num_bytes - 4 * VOCAB * HIDDEN) / per_layer)),
            hidden_size=HIDDEN,
            num_attention_heads=16,
            num_query_groups=4,
            kv_channels=128,
            ffn_hidden_size=4 * HIDDEN,
            num_moe_experts=EXPERTS,
            moe_router_topk=8,
            moe_ffn_hidden_size=EXPERT_FFN,
            qk_layernorm=True,
        )
        self.model = ModelConfig(vocab_size=VOCAB, max_position_embeddings=4096, transformer=transformer)
        self.family = FAMILIES["qwen3_moe"]
        self.weights = self.family.weights(self.model)
        self.companions = Companions()
        self._noise = torch.randn(1 << 22).bfloat16()

    def dtype(self, weight):
        return torch.bfloat16

    def slice_of(self, weight, start, size):
        count = torch.Size(size).numel()
        shift = hash((weight.key, weight.offsets)) % 9973
        return self._noise.roll(shift).repeat(-(-count // len(self._noise)))[:count].view(size)

    def tokenizer_directory(self):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--work", default="runs/convert-memory")
    parser.add_argument(
        "--worker", nargs=3, metavar=("DIRECTION", "SOURCE", "TARGET"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    start_ranks(torch.device("cpu"), timeout_minutes=10)
    if arguments.worker:
        work(*arguments.worker)
        return
    directory = Path(arguments.work)
    shutil.rmtree(directory, ignore_errors=True)
    try:
        compare(directory, arguments.gigabytes, arguments.ranks)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def compare(directory: Path, gigabytes: float, ranks: list[int]) -> None:
    hf = directory / "hf"
    directory.mkdir(parents=True)
    source = RandomModel(gigabytes * GB)
    write_hugging_face(source, hf, max_shard_size=GB)
    files = sorted(hf.iterdir())
    total = sum(file.stat().st_size for file in files)
    largest = max(2 * torch.Size(weight.shape).numel() for weight in source.weights)
    copying = plain_copy(files, directory / "copy")
    print(f"{total / GB:.2f} GB in {len(files)} files, {len(source.weights)} Megatron tensors, ", end="")
    print(f"the largest {largest / GB:.2f} GB; plain copy {copying:.1f} s ({total / GB / copying:.2f} GB/s)")
    print("ranks  direction       peak per rank   limit     time    copy / time")
    for count in ranks:
        limit = total / count + 2 * largest + GB
        for direction, origin, target in (
            ("to_megatron", hf, directory / "megatron"),
            ("to_hf", directory / "megatron", directory / "back"),
        ):
            peak, seconds = run(count, direction, origin, target)
            verdict = "" if peak <= limit else "  OVER THE LIMIT"
            memory = f"{peak / GB:>10.2f} GB  {limit / GB:>5.2f} GB"
            speed = f"{seconds:>5.1f} s  {copying / seconds:>8.2f}"
            print(f"{count:>5}  {direction:<14}  {memory}  {speed}{verdict}", flush=True)
        equal = filecmp.cmpfiles(hf, directory / "back", [file.name for file in files], shallow=False)[0]
        print(f"{count:>5}  {len(equal)} of {len(files)} files are equal to the original's")
        shutil.rmtree(directory / "megatron")
        shutil.rmtree(directory / "back")


def plain_copy(files: list[Path], target: Path) -> float:
    """Seconds to copy the files and flush them to disk."""
    target.mkdir()
    started = time.perf_counter()
    for file in files:
        shutil.copyfile(file, target / file.name)
        with open(target / file.name, "rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def run(ranks: int, direction: str, source: Path, target: Path) -> tuple[int, float]:
    """Largest peak resident memory of a rank in bytes, and seconds."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [
        sys.executable,
        *(launcher if ranks > 1 else []),
        __file__,
        "--worker",
        direction,
        source,
        target,
    ]
    output = subprocess.run(command, capture_output=True, text=True)
    if output.returncode:
        raise SystemExit(output.stderr)
    reports = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == ranks
    return max(r["peak"] for r in reports), max(r["seconds"] for r in reports)


def peak_resident() -> int:
    """Peak resident memory of this process in bytes. Not `ru_maxrss`, which starts with the parent's
    value."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024


def work(direction: str, source: str, target: str) -> None:
    """One rank of one conversion; prints its peak memory and time."""
    dist.barrier()
    started = time.perf_counter()
    opened = open_checkpoint(source, "--worker")
    (write_megatron if direction == "to_megatron" else write_hugging_face)(opened, Path(target))
    seconds = time.perf_counter() - started
    peak = peak_resident()
    print(json.dumps({"peak": peak, "seconds": seconds}) + "\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
