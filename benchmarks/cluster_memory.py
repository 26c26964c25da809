"""Memory of the recipes' two students on H100 nodes at several layouts: the tables of docs/cluster.md.

    python benchmarks/cluster_memory.py [--student qwen3_30b_a3b]

Needs no GPU and no checkpoint: the architectures are defined here (the published ones of Qwen3-30B-A3B and
Qwen3-235B-A22B), everything else is the recipe `deepseek_v4` with that student. The estimates come from the
code behind `tools/estimate.py`, on the meta device; nothing here is measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path

from megatron_mopd.commands.estimate import estimate, fullest_host, stage_ranks
from megatron_mopd.config import load_config
from megatron_mopd.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_mopd.model.checkpoint import MODEL_FILE

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "deepseek_v4.yaml"
QWEN3_MOE = dict(
    kv_channels=128,
    num_query_groups=4,
    qk_layernorm=True,
    normalization="RMSNorm",
    gated_linear_unit=True,
    add_bias_linear=False,
    num_moe_experts=128,
    moe_router_topk=8,
)
ARCHITECTURES = {
    "qwen3_30b_a3b": QWEN3_MOE
    | dict(
        num_layers=48,
        hidden_size=2048,
        num_attention_heads=32,
        ffn_hidden_size=6144,
        moe_ffn_hidden_size=768,
    ),
    "qwen3_235b_a22b": QWEN3_MOE
    | dict(
        num_layers=94,
        hidden_size=4096,
        num_attention_heads=64,
        ffn_hidden_size=12288,
        moe_ffn_hidden_size=1536,
    ),
}
VOCABULARY = 151936
RANKS_PER_HOST = 8
COMPONENTS = ("student weights", "gradients", "optimizer", "activations", "teacher slots", "loss")
# student -> (ranks, TP, PP, EP, CP); the first layout is the recipe's own.
LAYOUTS = {
    "qwen3_30b_a3b": [
        (32, 2, 2, 8, 1),
        (32, 1, 1, 8, 1),
        (32, 1, 1, 32, 1),
        (32, 4, 1, 8, 1),
        (16, 2, 2, 8, 1),
        (32, 2, 2, 8, 2),
    ],
    "qwen3_235b_a22b": [
        (256, 4, 2, 32, 1),
        (256, 4, 2, 64, 1),
        (256, 4, 2, 128, 1),
        (128, 4, 2, 64, 1),
        (256, 8, 2, 32, 1),
        (256, 4, 2, 64, 2),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", choices=sorted(ARCHITECTURES), help="default: both")
    only = parser.parse_args().student
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    for student in [only] if only else ARCHITECTURES:
        with tempfile.TemporaryDirectory() as directory:
            show(student, Path(directory))


def show(student: str, directory: Path) -> None:
    """Print one table with a line per layout, in GiB."""
    load = describe(student, directory)
    print(f"\n{student}, GiB per GPU and per host of 8")
    print(
        f"{'ranks':>6}{'TP':>4}{'PP':>4}{'EP':>5}{'CP':>4}" + "".join(f"{n:>17}" for n in COMPONENTS), end=""
    )
    print(f"{'total':>8}{'host':>8}{'seconds':>9}")
    for layout in LAYOUTS[student]:
        started = time.perf_counter()
        sizes, total, host = estimated(student, load, layout)
        ranks, tp, pp, ep, cp = layout
        print(f"{ranks:6}{tp:4}{pp:4}{ep:5}{cp:4}" + "".join(f"{size:17.1f}" for size in sizes), end="")
        print(f"{total:8.1f}{host:8.0f}{time.perf_counter() - started:9.1f}", flush=True)


def estimated(student: str, load: Path, layout: tuple[int, ...]) -> tuple[list[float], float, float]:
    """GiB of each component on the fullest GPU, their total, and the total of the fullest host, with four
    teachers."""
    ranks, tp, pp, ep, cp = layout
    teachers = ", ".join(f"{{name: {name}, load: {load}}}" for name in ("math", "code", "agent", "chat"))
    overrides = [
        f"include=students/{student}.yaml",
        f"student.load={load}",
        f"data.tokenizer={load.parent / 'tokenizer.model'}",
        f"teachers=[{teachers}]",
        "routing={math: math, code: code, agent: agent, chat: chat}",
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.sequence_parallel={str(tp > 1).lower()}",
        f"parallel.pipeline_model_parallel_size={pp}",
        f"parallel.expert_model_parallel_size={ep}",
        f"parallel.context_parallel_size={cp}",
    ]
    config = load_config(RECIPE, overrides)
    memory = estimate(config, ranks, stage_ranks(config, ranks), RANKS_PER_HOST)
    fullest = max((item.device for item in memory.values()), key=lambda sizes: sum(sizes.values()))
    sizes = [fullest.get(name, 0) / 2**30 for name in COMPONENTS]
    host = sum(fullest_host(memory, ranks, RANKS_PER_HOST).values()) / 2**30
    return sizes, sum(fullest.values()) / 2**30, host


def describe(student: str, directory: Path) -> Path:
    """Write a checkpoint description without weights, which is all that an estimate reads."""
    train_sentencepiece(["one two three four five six seven"] * 9, directory / "tokenizer.model", 280)
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir()
    model = ARCHITECTURES[student] | {"vocab_size": VOCABULARY}
    tokenizer = load_tokenizer(directory / "tokenizer.model").fingerprint()
    (checkpoint / MODEL_FILE).write_text(json.dumps({"model": model, "tokenizer": tokenizer}))
    return checkpoint


if __name__ == "__main__":
    main()
