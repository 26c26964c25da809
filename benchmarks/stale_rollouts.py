"""Off-policy stress test: train on rollouts that are 0 to 4 optimizer steps old, with and without correction.

    python benchmarks/stale_rollouts.py                      # after `make demo`
    python benchmarks/stale_rollouts.py --steps 40 --staleness 0 4 --corrections none icepop

Every iteration trains on the batch that was sampled `staleness` optimizer steps earlier (the first ones on
batches of the initial weights). The student, experts, samples and steps are those of
`launch/recipes/demo_tiny.yaml`. Prints for each setting the held-out accuracy, the mean KL per token to the
teachers over a fresh rollout of the final student (one-sample estimate for `sampled_token`, exact for
`full_vocab_kl`), and the share of tokens whose theta / mu is outside the band in the last quarter of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.config import load_config
from megatron_mopd.data.prompts import PromptSampler
from megatron_mopd.run.evaluation import evaluation
from megatron_mopd.run.setup import build_run
from megatron_mopd.train import sample
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step

TINY = Path(__file__).parent.parent / "launch/recipes/demo_tiny.yaml"


def train_stale(arguments: argparse.Namespace) -> dict[str, float]:
    """One run whose batches are `staleness` steps old."""
    overrides = [
        f"objective.kind={arguments.kind}",
        f"objective.rollout_correction={arguments.correction}",
        f"schedule.train_iters={arguments.steps}",
        f"optimizer.lr={arguments.lr}",
        "schedule.kind=megatron",
        f"run_dir={arguments.run_dir}",
        *arguments.overrides,
    ]
    run = build_run(load_config(TINY, overrides))
    sampler = PromptSampler(run.prompts, run.config.seed)
    waiting = deque(sample(run, sampler, i)[0] for i in range(arguments.staleness))
    distances = []
    for step in range(arguments.steps):
        waiting.append(sample(run, sampler, arguments.staleness + step)[0])
        metrics = train_step(run.learner, [plan_step(run.learner, waiting.popleft())])
        if step >= 3 * arguments.steps // 4:
            ratios = [value for key, value in metrics.items() if key.startswith("in_band/")]
            distances.append(1 - sum(ratios) / max(1, len(ratios)))
    accuracy = evaluation(run)["accuracy"]
    fresh = sample(run, sampler, arguments.staleness + arguments.steps)[0]
    final = train_step(run.learner, [plan_step(run.learner, fresh)])  # its KL is that before the step
    kl = [value for key, value in final.items() if key.startswith("kl/")]
    return {
        "accuracy": accuracy,
        "kl": sum(kl) / len(kl),
        "outside": sum(distances) / max(1, len(distances)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="sampled_token")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--corrections", nargs="+", default=["none", "icepop", "tis"])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        correction, staleness = arguments.one.split(",")
        arguments.correction, arguments.staleness = correction, int(staleness)
        with tempfile.TemporaryDirectory() as arguments.run_dir:
            print(json.dumps(train_stale(arguments)))
        return
    rows = []
    for staleness in arguments.staleness:
        for correction in arguments.corrections:
            command = [sys.executable, *sys.argv, "--one", f"{correction},{staleness}"]
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            ).stdout
            result = json.loads(output.strip().splitlines()[-1])
            rows.append((staleness, correction, *(f"{result[k]:.3f}" for k in ("accuracy", "kl", "outside"))))
            print(*rows[-1], flush=True)


if __name__ == "__main__":
    main()
