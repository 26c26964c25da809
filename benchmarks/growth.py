"""Disk space of a long run's records: 100,000 steps of twelve domains, written by the run's own writers.

    python benchmarks/growth.py [--steps 100000] [--domains 12]

Every domain has its own teacher, so a step has every metric; values are random with realistic magnitudes, and
a sample of 256 tokens per domain is written every 50 steps. "Before" is the size without compression or
omission: all lines as written, and for TensorBoard the bytes of every value of 500 steps, scaled to the
number of steps.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.config import config_from_dict
from megatron_mopd.observe.journal import ALARMS_FILE, METRICS_FILE, SAMPLES_FILE, parts_of, read_journal
from megatron_mopd.observe.metrics import MOST_LINES, read_metrics
from megatron_mopd.observe.run_log import RunLog

_EVALUATE_EVERY = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--domains", type=int, default=12)
    options = parser.parse_args()
    rng, domains = random.Random(0), [f"domain_{number}" for number in range(options.domains)]
    with tempfile.TemporaryDirectory() as name:
        per_step = tensorboard_bytes(Path(name) / "all", rng, domains) / 500
        run_dir = Path(name) / "run"
        started = time.process_time()
        samples, largest = write(run_dir, rng, domains, options.steps)
        seconds = time.process_time() - started
        began = time.process_time()
        shown = read_metrics(run_dir, most=MOST_LINES)
        reading = time.process_time() - began
        parts = parts_of(run_dir / METRICS_FILE)
        follow = [parts[0].first, *(part.last + 1 for part in parts)] if parts else [1]
        rest = [line["iteration"] for line in read_journal(run_dir / METRICS_FILE, follow[-1])]
        assert [part.first for part in parts] == follow[:-1], "a step is missing"
        assert rest == list(range(follow[-1], options.steps + 1)), "a step is missing"
        events = sum(path.stat().st_size for path in run_dir.glob("events*"))
        print(f"{options.steps} steps, {options.domains} domains, {len(shown[0]) - 1} metrics per step")
        lines, size = size_of(run_dir / METRICS_FILE)
        show("metrics", lines, size, f"metrics.jsonl itself at most {largest / 1e6:.1f} MB")
        show("TensorBoard", per_step * options.steps, events, "logarithmic in the steps")
        kept = len({line["iteration"] for line in read_journal(run_dir / SAMPLES_FILE)})
        show("samples", samples, size_of(run_dir / SAMPLES_FILE)[1], f"of {kept} steps")
        show("alarms", *size_of(run_dir / ALARMS_FILE))
        print(
            f"CPU time: {1e6 * seconds / options.steps:.0f} us per step in total; a report reads "
            f"{len(shown)} of the lines in {reading:.1f} s"
        )


def write(run_dir: Path, rng: random.Random, domains: list[str], steps: int) -> tuple[int, int]:
    """Write the records; returns the bytes of all lines of samples, and of the largest `metrics.jsonl`."""
    config = config_from_dict(
        {
            "run_dir": str(run_dir),
            "schedule": {"train_iters": steps},
            "log": {"log_interval": max(1, steps // 5)},
        }
    )
    log = RunLog(config, 0)
    samples = largest = 0
    for iteration in range(1, steps + 1):
        log.step(iteration, step_metrics(rng, domains, iteration))
        if iteration % 1000 == 0:
            largest = max(largest, (run_dir / METRICS_FILE).stat().st_size)
        if iteration % config.log.sample_interval == 0:
            entries = [sample(rng, domain) for domain in domains]
            samples += sum(len(json.dumps({"iteration": iteration, **entry})) + 1 for entry in entries)
            log.samples(iteration, entries)
        if iteration % 500 == 0:
            log.alarm(iteration, f"the KL of domain {rng.choice(domains)!r} has grown from 0.1 to 0.4")
    log.close()
    return samples, largest


def step_metrics(rng: random.Random, domains: list[str], iteration: int) -> dict[str, float]:
    """The metrics of one step, with the names that training uses."""
    metrics = {"loss": rng.random(), "grad_norm": rng.random(), "lr": 1e-6, "kl": rng.random()}
    metrics |= {f"time/{phase}": rng.random() for phase in ("rollout", "score", "train", "other")}
    metrics |= {"tokens_per_second": 1e5 * rng.random(), "response_length": 900 * rng.random()}
    metrics |= {"tflops": 300 * rng.random(), "mfu": rng.random()}
    metrics |= {f"teachers/{kind}_bytes": 2.0**30 for kind in ("device", "host", "cache")}
    for domain in domains:
        for name in ("kl", "length", "unfinished", "rollout_entropy", "reward"):
            metrics[f"{name}/{domain}"] = rng.random()
        for name in ("kl", "score_seconds", "load_seconds", "load_hidden"):
            metrics[f"teacher/{domain}/{name}"] = rng.random()
        metrics[f"teacher/{domain}/tokens"] = float(rng.randrange(100_000))
        metrics[f"teacher/{domain}/loads"] = 4.0
    if iteration % _EVALUATE_EVERY == 0:
        metrics |= {f"accuracy/{domain}": rng.random() for domain in domains} | {"accuracy": rng.random()}
    return metrics


def sample(rng: random.Random, domain: str) -> dict:
    """The sample of one response."""
    words = [rng.choice((" the", " of", "tion", "\n", " 42", " =", " therefore", "a")) for _ in range(256)]
    numbers = [[round(rng.expovariate(5.0), 6) for _ in words] for _ in range(2)]
    return {"domain": domain, "prompt": "p" * 300, "tokens": words, "kl": numbers[0], "logprobs": numbers[1]}


def tensorboard_bytes(run_dir: Path, rng: random.Random, domains: list[str]) -> int:
    """TensorBoard bytes per step, from 500 steps with every value as a separate event."""
    writer = SummaryWriter(str(run_dir))
    for iteration in range(1, 501):
        for name, value in step_metrics(rng, domains, iteration).items():
            writer.add_scalar(name, value, iteration)
    writer.close()
    return sum(path.stat().st_size for path in run_dir.glob("events*"))


def size_of(journal: Path) -> tuple[int, int]:
    """Bytes of a journal's lines, and its bytes on disk, including compressed parts."""
    lines = size = journal.stat().st_size
    for part in parts_of(journal):
        lines += int.from_bytes(part.path.read_bytes()[-4:], "little")  # gzip ends with the uncompressed size
        size += part.path.stat().st_size
    return lines, size


def show(name: str, before: float, after: float, note: str = "") -> None:
    print(f"{name:12} {before / 1e6:8.1f} MB before, {after / 1e6:7.1f} MB after  {note}")


if __name__ == "__main__":
    main()
