"""Tokens per second of in-process generation beside `transformers.generate`: same prompts, same run.

    python benchmarks/generation.py --hf DIR [--batch-size 1 8 32]     # part of `make real-model`

Both decode greedily with a KV cache in float32 on the CPU, for exactly as many tokens as asked, and take
turns; the best of each is compared. Prompts have different lengths.
"""

import argparse
import time
import warnings

import torch
import transformers
from _real_model import OurModel, prompts, start

from megatron_mopd.data.tokenizer import load_tokenizer
from megatron_mopd.rollout.engine import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, help="Hugging Face directory of the model")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()

    theirs = transformers.AutoModelForCausalLM.from_pretrained(arguments.hf, dtype=torch.float32).eval()
    groups = start()  # after the other model: it changes what `torch` does on the CPU
    tokenizer = load_tokenizer(arguments.hf)
    asked = prompts(max(arguments.batch_size), tokenizer)
    longest = max(len(prompt.token_ids) for prompt in asked) + arguments.new_tokens
    ours = OurModel(arguments.hf, groups, longest)
    sampling = SamplingParams(arguments.new_tokens, temperature=0.0)

    print(f"{torch.get_num_threads()} threads, {arguments.new_tokens} new tokens a prompt, float32")
    print(f"{'batch':>5}  {'transformers':>12}  {'ours':>8}  ratio  same tokens")
    for size in arguments.batch_size:
        batch = asked[:size]
        best = {"ours": float("inf"), "theirs": float("inf")}
        for _ in range(arguments.repeats):
            started = time.perf_counter()
            reference = generate_with_transformers(theirs, batch, arguments.new_tokens, tokenizer)
            best["theirs"] = min(best["theirs"], time.perf_counter() - started)
            started = time.perf_counter()
            answers = ours.engine.generate(batch, sampling, seed=0)
            best["ours"] = min(best["ours"], time.perf_counter() - started)
        tokens = size * arguments.new_tokens
        same = sum(list(a.response_ids) == b for a, b in zip(answers, reference, strict=True))
        print(
            f"{size:>5}  {tokens / best['theirs']:>10.1f}/s  {tokens / best['ours']:>6.1f}/s  "
            f"{best['theirs'] / best['ours']:>5.2f}  {same} of {size}",
            flush=True,
        )


def generate_with_transformers(model, batch, new_tokens: int, tokenizer) -> list[list[int]]:
    """Greedy continuations of left-padded prompts with the default cache."""
    longest = max(len(prompt.token_ids) for prompt in batch)
    rows = [[tokenizer.pad_id] * (longest - len(p.token_ids)) + list(p.token_ids) for p in batch]
    mask = [[0] * (longest - len(p.token_ids)) + [1] * len(p.token_ids) for p in batch]
    output = model.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_id,
    )
    return output[:, longest:].tolist()


if __name__ == "__main__":
    main()
