"""Merge twelve experts into one mixture-of-experts student on this machine: the whole method in miniature.

    python tools/demo.py                    # or: make demo
    python tools/demo.py --seed 2 --run-dir runs/demo2

Runs six stages, each an ordinary command that it prints, and skips stages whose result already exists:

    tokenizer   a SentencePiece model trained on the tasks' own prompts
    base        a small mixture of experts, briefly trained on thirteen reasoning-gym tasks (supervised)
    experts     twelve continuations of the base, one task each: each improves on its task, worsens on others
    average     the mean of the twelve experts' weights, for comparison
    mopd        the base samples, the experts score, it is pulled towards them (on-policy distillation)
    report      accuracy by model and task: a table, the picture `seesaw.png`, and the page `mopd/report.html`

The thirteenth task has no expert. Its teacher is `self`, the initial student, which preserves that skill.
All scores are on prompts that no stage was trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.config import PromptSource
from megatron_mopd.data.phrases import shared_phrases
from megatron_mopd.data.reasoning_tasks import task_entries
from megatron_mopd.data.tokenizer import train_sentencepiece
from megatron_mopd.observe.metrics import read_metrics
from megatron_mopd.observe.pictures import draw_seesaw
from megatron_mopd.observe.progress import format_seconds, progress
from megatron_mopd.observe.tables import seesaw_table

# Task -> parameters: small enough for a model of a million weights, with many hundreds of prompts each.
EXPERTS: dict[str, dict[str, Any]] = {
    "basic_arithmetic": dict(
        min_terms=2,
        max_terms=2,
        max_digits=1,
        operators=["+", "-", "*"],
        format_style="natural",
        allow_parentheses=False,
        allow_negation=False,
    ),
    "complex_arithmetic": dict(
        min_real=0, max_real=6, min_imag=0, max_imag=6, operations=["+", "-"], operations_weights=[0.5, 0.5]
    ),
    "simple_equations": dict(
        min_terms=2, max_terms=2, max_value=9, operators=["+", "-"], operators_weights=[0.5, 0.5]
    ),
    "leg_counting": dict(min_animals=2, max_animals=2, max_instances=3),
    "number_sorting": dict(min_numbers=4, max_numbers=4, max_decimals=0, min_value=0, max_value=19),
    "rotate_matrix": dict(min_n=2, max_n=2),
    "spiral_matrix": dict(min_n=2, max_n=3),
    "string_insertion": dict(min_string_length=5, max_string_length=10),
    "palindrome_generation": dict(min_length=3, max_length=4),
    "calendar_arithmetic": dict(tasks=["is_leap_year"], leap_year_range=400),
    "syllogism": dict(),
    "aiw": dict(),
}
# This task has no expert: its teacher is `self`.
GENERAL: dict[str, dict[str, Any]] = {"gcd": dict(max_value=40)}
# Weights of the prompt sources, 1 by default. The base sees few prompts of tasks that are learned quickly, so
# that every expert has something to add; merging uses more samples where answers are long or hard.
BASE_WEIGHT = dict(spiral_matrix=0.4, string_insertion=0.4, calendar_arithmetic=0.2, syllogism=0.1, aiw=0.15)
MOPD_WEIGHT = dict(
    calendar_arithmetic=1.5,
    number_sorting=1.5,
    complex_arithmetic=1.4,
    rotate_matrix=1.4,
    palindrome_generation=1.2,
    leg_counting=1.6,
    basic_arithmetic=1.2,
    string_insertion=0.8,
    spiral_matrix=0.8,
    aiw=0.5,
)
TASKS = EXPERTS | GENERAL

MODEL = dict(
    num_layers=4,
    hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    qk_layernorm=True,
    ffn_hidden_size=256,
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=192,
    moe_router_load_balancing_type="aux_loss",
    moe_aux_loss_coeff=0.025,
    init_method_std=0.06,
    embedding_init_method_std=0.1,
)
VOCABULARY = 1024
HELD_OUT = 200
TOOLS = Path(__file__).parent
HELD_OUT_SEED, TOKENIZER_SEED, BASE_SEED, EXPERT_SEED, MOPD_SEED = range(5)


def sources(
    tasks: Iterable[str], seed: int, size: int, weights: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Entries of `data.prompts`, `size` prompts per task."""
    weights = weights or {}
    return [
        dict(task=task, params=TASKS[task], seed=seed, size=size, weight=weights.get(task, 1.0))
        for task in tasks
    ]


class Demo:
    """The stages' configurations and output directories."""

    def __init__(self, run_dir: Path, seed: int, processes: int):
        self.run_dir, self.seed, self.processes = run_dir, seed, processes
        self.tokenizer = run_dir / "tokenizer.model"

    def prompts(
        self, tasks: Iterable[str], stage_seed: int, size: int, weights: Mapping[str, float] | None = None
    ) -> list[dict[str, Any]]:
        return sources(tasks, 10 * self.seed + stage_seed, size, weights)

    def common(self, name: str, prompts: list[dict[str, Any]]) -> dict[str, Any]:
        """Settings shared by all training stages. Stages draw different prompts, never held-out ones."""
        return dict(
            run_dir=str(self.run_dir / name),
            seed=self.seed,
            data=dict(
                tokenizer=str(self.tokenizer),
                seq_length=128,
                prompts=prompts,
                eval=self.prompts(TASKS, HELD_OUT_SEED, HELD_OUT),
            ),
            rollout=dict(max_new_tokens=24, max_batch_size=1024),
            log=dict(log_interval=10, tensorboard=False),
        )

    def base(self) -> dict[str, Any]:
        return self.common("base", self.prompts(TASKS, BASE_SEED, 4000, BASE_WEIGHT)) | dict(
            student=MODEL,
            objective=dict(kind="sft"),
            optimizer=optimizer(3e-3, warmup=20),
            schedule=dict(train_iters=170, global_batch_size=256, max_tokens_per_micro_batch=4096),
        )

    def expert(self, task: str) -> dict[str, Any]:
        return self.common(f"experts/{task}", self.prompts([task], EXPERT_SEED, 6000)) | dict(
            student=dict(load=str(self.run_dir / "base/checkpoints")),
            objective=dict(kind="sft"),
            optimizer=optimizer(2e-3, warmup=5),
            schedule=dict(train_iters=56, global_batch_size=128, max_tokens_per_micro_batch=4096),
            checkpoint=dict(save_optimizer=False),
        )

    def mopd(self) -> dict[str, Any]:
        teachers = [
            dict(name=task, load=str(self.run_dir / f"experts/{task}/checkpoints")) for task in EXPERTS
        ]
        return self.common("mopd", self.prompts(TASKS, MOPD_SEED, 8000, MOPD_WEIGHT)) | dict(
            student=dict(load=str(self.run_dir / "base/checkpoints")),
            teachers=[*teachers, dict(name="self")],
            routing={task: task for task in EXPERTS} | dict(default="self"),
            # Where the student is confident of a wrong answer, p near 0 or 1, reverse KL has no gradient.
            # With it alone, the student answers "no" to every date after twenty steps and needs hundreds to
            # recover; adding some forward KL provides a gradient there.
            objective=dict(kind="full_vocab_kl", add=dict(forward_kl=1.0)),
            optimizer=optimizer(1.2e-3, warmup=10),
            schedule=dict(
                train_iters=320, global_batch_size=480, steps_per_rollout=4, max_tokens_per_micro_batch=4096
            ),
            checkpoint=dict(save_interval=40),
        )

    def average(self) -> dict[str, Any]:
        return self.common("average", self.prompts(TASKS, BASE_SEED, 4000, BASE_WEIGHT)) | dict(
            student=dict(load=str(self.run_dir / "averaged")),
            objective=dict(kind="sft"),
            schedule=dict(train_iters=0),
        )


def optimizer(lr: float, warmup: int) -> dict[str, Any]:
    return dict(
        lr=lr,
        min_lr=0.05 * lr,
        lr_decay_style="cosine",
        lr_warmup_iters=warmup,
        weight_decay=0.01,
        adam_beta2=0.98,
    )


class Stages:
    """Runs stages as commands, and checks which of them are done."""

    def __init__(self, run_dir: Path):
        self.configs, self.logs = run_dir / "configs", run_dir / "logs"
        for directory in (self.configs, self.logs):
            directory.mkdir(parents=True, exist_ok=True)
        # One thread per process, as there are as many processes as cores. Hide the deprecation warnings of
        # libraries.
        quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
        self.environment = os.environ | {"OMP_NUM_THREADS": "1"} | quiet

    def prepare(self, config: dict[str, Any]) -> Path | None:
        """Write a stage's configuration; `None` if its run is complete. Removes the results of a different
        configuration.
        """
        run_dir = Path(config["run_dir"])
        path = self.configs / f"{run_dir.name}.yaml"
        text = yaml.safe_dump(config, sort_keys=False)
        if not path.exists() or path.read_text() != text:
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
            (run_dir / "metrics.jsonl").unlink(missing_ok=True)
            path.write_text(text)
        last = accuracies(run_dir)
        return None if last and last["iteration"] >= config["schedule"]["train_iters"] else path

    def train(self, config: dict[str, Any], processes: int) -> None:
        """One run on the terminal, over `processes` ranks."""
        if path := self.prepare(config):
            self.command("-m", "megatron_mopd.train", "--config", str(path), processes=processes)

    def train_side_by_side(self, configs: list[dict[str, Any]], at_once: int, what: str) -> None:
        """Several single-process runs, `at_once` at a time, each with its own log."""
        paths = [path for path in map(self.prepare, configs) if path]
        if not paths:
            return
        print(f"$ python -m megatron_mopd.train --config {paths[0]}   # and {len(paths) - 1} more")

        def run(path: Path) -> None:
            log = self.logs / f"{path.stem}.log"
            with open(log, "w") as output:
                command = [sys.executable, "-m", "megatron_mopd.train", "--config", str(path)]
                status = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, env=self.environment
                )
            if status.returncode:
                lines = log.read_text(errors="replace").strip().splitlines()[-5:]
                raise SystemExit(f"{path.stem} failed (whole log: {log}):\n" + "\n".join(lines))

        with ThreadPoolExecutor(at_once) as pool:
            for _ in progress(pool.map(run, paths), what, total=len(paths)):
                pass

    def command(self, *arguments: str, processes: int = 1) -> None:
        """Print a command and run it; the demo ends if it fails."""
        if processes > 1:
            start = ["torchrun", "--nproc-per-node", str(processes)]
            command = [sys.executable, "-m", "torch.distributed.run", *start[1:], *arguments]
        else:
            start = ["python"]
            command = [sys.executable, *arguments]
        print("$", *start, *arguments, flush=True)
        if status := subprocess.run(command, env=self.environment).returncode:
            raise SystemExit(
                f"this command ended with status {status}; run the demo again to continue from here"
            )


def accuracies(run_dir: str | Path) -> dict[str, Any] | None:
    """The last line of a run's metrics with held-out accuracies."""
    if not (Path(run_dir) / "metrics.jsonl").exists():
        return None
    return next((line for line in reversed(read_metrics(run_dir)) if "accuracy" in line), None)


def train_tokenizer(path: Path) -> None:
    """Train a tokenizer on a few hundred prompts and answers of each task; fixed instructions become single
    tokens.
    """
    texts, phrases = [], []
    for source in progress(sources(TASKS, TOKENIZER_SEED, 400), "tokenizer"):
        entries = task_entries(PromptSource(**source), "demo")
        prompts = [entry["question"] for entry in entries]
        phrases += shared_phrases(prompts, shortest=4, share=0.03)
        texts += prompts + [str(entry["answer"]) for entry in entries]
    temporary = path.with_suffix(".tmp")
    train_sentencepiece(texts, temporary, VOCABULARY, whole_pieces=[*phrases, *"ABCDE"])
    temporary.replace(path)


def report(demo: Demo) -> dict[str, float]:
    """Write a table, `seesaw.png` and `results.json`; returns headroom recovered per domain and its mean."""
    rows = {"base": "base"} | {task: f"experts/{task}" for task in EXPERTS}
    rows |= {"weight average": "average", "MOPD student": "mopd"}
    lines = {name: accuracies(demo.run_dir / directory) for name, directory in rows.items()}
    matrix = [[line[f"accuracy/{task}"] for task in TASKS] for line in lines.values()]
    headroom = {}
    for task in EXPERTS:
        base, expert, student = (lines[n][f"accuracy/{task}"] for n in ("base", task, "MOPD student"))
        headroom[task] = (student - base) / (expert - base) if expert > base else float("nan")
    headroom["mean"] = sum(headroom.values()) / len(headroom)
    results = {
        "seed": demo.seed,
        "held_out_prompts_per_task": HELD_OUT,
        "accuracy": {name: dict(zip(TASKS, row)) for name, row in zip(rows, matrix)},
        "headroom_recovered": headroom,
    }
    (demo.run_dir / "results.json").write_text(json.dumps(results, indent=2))
    seesaw_table(matrix, list(rows), list(TASKS), headroom)
    print(draw_seesaw(matrix, list(rows), list(TASKS), demo.run_dir / "seesaw.png", headroom))
    return headroom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="directory for all output")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights, prompts and sampling")
    parser.add_argument(
        "--processes", type=int, default=2, help="ranks of a run, and experts trained in parallel"
    )
    arguments = parser.parse_args()
    demo = Demo(arguments.run_dir, arguments.seed, arguments.processes)
    stages = Stages(demo.run_dir)
    began = time.monotonic()

    def stage(title: str) -> None:
        print(f"\n[{format_seconds(time.monotonic() - began)}] {title}", flush=True)

    stage(f"tokenizer: {VOCABULARY} pieces, from the prompts of {len(TASKS)} tasks")
    if not demo.tokenizer.exists():
        train_tokenizer(demo.tokenizer)
    stage("base: a short run on all tasks")
    stages.train(demo.base(), demo.processes)
    stage(f"experts: {len(EXPERTS)} continuations of the base, one task each")
    stages.train_side_by_side([demo.expert(task) for task in EXPERTS], demo.processes, "experts")
    stage("average: the mean of the experts' weights")
    average = demo.run_dir / "averaged"
    if not average.exists():
        experts = [str(demo.run_dir / f"experts/{task}/checkpoints") for task in EXPERTS]
        stages.command(str(TOOLS / "average_checkpoints.py"), "--output", str(average), *experts)
    stages.train(demo.average(), 1)
    stage(f"mopd: {len(EXPERTS)} experts and self teach one student")
    stages.train(demo.mopd(), demo.processes)
    stage("report")
    headroom = report(demo)
    stages.command(str(TOOLS / "report.py"), str(demo.run_dir / "mopd"))
    minutes = (time.monotonic() - began) / 60
    print(f"The student recovered {headroom['mean']:.0%} of the experts' headroom ({minutes:.1f} minutes).")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command continues where this one stopped")
