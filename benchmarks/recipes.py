"""The recipes of four systems with equal samples: headroom recovered, wall time and final KL.

    make demo
    python benchmarks/recipes.py                     # all four, 9 to 16 minutes each on two busy cores
    python benchmarks/recipes.py glm5 deepseek_v4 --processes 1

Each recipe trains the demo's base on two of the demo's experts (`launch/recipes/NAME_tiny.yaml`): the same
prompts, samples, steps and learning rate, so that only the objective differs. Headroom recovered is
(student - base) / (expert - base) in held-out accuracy. The KL is the mean over the last tenth of the steps:
exact for full-vocabulary objectives, the one-sample estimate for sampled-token ones. Wall time covers all
training steps, including sampling, without start-up and evaluation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.config import load_config
from megatron_mopd.config.recipes import RECIPES
from megatron_mopd.observe.metrics import read_metrics
from megatron_mopd.observe.progress import progress

TINY = Path(__file__).parent.parent / "launch/recipes"


def accuracy(run_dir: str | Path, domain: str) -> float:
    """A domain's last held-out accuracy in a run's metrics."""
    return next(line[f"accuracy/{domain}"] for line in reversed(read_metrics(run_dir)) if "accuracy" in line)


def train(recipe: str, processes: int) -> dict[str, float]:
    """Train once; returns headroom recovered and KL by domain, and the seconds of all steps."""
    path = TINY / f"{recipe}_tiny.yaml"
    config = load_config(path, [])
    (Path(config.run_dir) / "metrics.jsonl").unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    subprocess.run(
        [sys.executable, *launcher, "-m", "megatron_mopd.train", "--config", str(path)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    lines = read_metrics(config.run_dir)
    steps = [line for line in lines if "loss" in line]
    last = steps[-max(1, len(steps) // 10) :]
    base = Path(config.student.load).parent
    result = {"seconds": sum(line["time/rollout"] + line["time/train"] for line in steps)}
    for teacher in config.teachers:
        domain = teacher.name
        before, expert = accuracy(base, domain), accuracy(Path(teacher.load).parent, domain)
        student = accuracy(config.run_dir, domain)
        result[f"headroom/{domain}"] = (student - before) / (expert - before)
        result[f"kl/{domain}"] = mean(line[f"kl/{domain}"] for line in last if f"kl/{domain}" in line)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help="default: all four")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    results = {
        recipe: train(recipe, arguments.processes) for recipe in progress(arguments.recipes, "recipes")
    }
    domains = [key.removeprefix("headroom/") for key in next(iter(results.values())) if "headroom/" in key]
    print("| recipe | " + " | ".join(domains) + " | mean headroom | mean KL | wall time |")
    print("|---|" + "---|" * (len(domains) + 3))
    for recipe, result in results.items():
        cells = [f"{result[f'headroom/{d}']:.0%} (KL {result[f'kl/{d}']:.3f})" for d in domains]
        headroom = mean(result[f"headroom/{d}"] for d in domains)
        kl = mean(result[f"kl/{d}"] for d in domains)
        print(f"| `{recipe}` | {' | '.join(cells)} | {headroom:.0%} | {kl:.3f} | {result['seconds']:.0f} s |")


if __name__ == "__main__":
    main()
