"""Tokens per second of a rollout: short prompts and answers, a mixture of experts with 1M parameters.

    torchrun --nproc-per-node 2 benchmarks/rollout.py --prompts 1200 [parallel.KEY=VALUE ...]

Weights are random, and a fifth of the vocabulary are stop tokens, so responses have about five tokens. Prints
the best of three rollouts over all ranks.
"""

import argparse
import random
import time
import warnings

import torch
import torch.distributed as dist

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.backend.parallel import build_parallel_groups, select_device, start_ranks
from megatron_mopd.config import ModelConfig, config_from_dict
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.model.build import build_model
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.rollout.megatron_engine import MegatronEngine

VOCAB, SEQUENCE_LENGTH = 500, 128
STUDENT = dict(
    num_layers=4,
    hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=256,
    qk_layernorm=True,
    num_moe_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=64,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--samples-per-prompt", type=int, default=1)
    parser.add_argument("--max-batch-size", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("layout", nargs="*", help="for example parallel.expert_model_parallel_size=2")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    layout = {}
    for item in arguments.layout:
        key, value = item.removeprefix("parallel.").split("=")
        layout[key] = value == "true" if value in ("true", "false") else int(value)
    parallel = config_from_dict({"run_dir": "unused", "parallel": layout}).parallel
    device = select_device("auto")
    start_ranks(device, timeout_minutes=1)
    groups = build_parallel_groups(parallel, device, seed=1)
    student = ModelConfig(vocab_size=VOCAB, transformer=STUDENT)
    chunks = build_model(student, groups, "float32", max_sequence_length=SEQUENCE_LENGTH, seed=1)
    engine = MegatronEngine(
        chunks,
        groups,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE_LENGTH,
        max_batch_size=arguments.max_batch_size,
    )

    rng = random.Random(0)
    prompts = []
    for i in range(arguments.prompts):
        token_ids = tuple(rng.choices(range(VOCAB), k=rng.randint(20, 45)))
        prompts.append(Prompt("", token_ids, "-", None, "-", None, i, f"prompt {i}"))
    sampling = SamplingParams(arguments.max_new_tokens, stop_token_ids=tuple(range(VOCAB // 5)))
    engine.generate(prompts[:8], sampling, seed=0)
    best = float("inf")
    for seed in range(3):
        start = time.perf_counter()
        trajectories = engine.generate(
            prompts, sampling, seed=seed, samples_per_prompt=arguments.samples_per_prompt
        )
        best = min(best, time.perf_counter() - start)
    if dist.get_rank() == 0:
        sampled = sum(trajectory.response_length for trajectory in trajectories)
        total = sum(map(len, trajectories))
        print(f"{dist.get_world_size()} ranks, {layout or 'data parallel'}: ", end="")
        print(
            f"{len(trajectories)} responses in {best:.2f} s, {sampled / best:,.0f} sampled tokens/s, ", end=""
        )
        print(f"{total / best:,.0f} tokens/s including prompts")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
