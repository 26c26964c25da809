"""Create three small Hugging Face models to try the whole workflow: a base, and two experts trained from it.

    python tools/make_small_experts.py --output runs/own

Writes `base`, `add-expert` and `reverse-expert` (Qwen3-MoE with 0.2 million weights and a tokenizer, as saved
by `transformers`), and prompts of the domains `add` and `reverse`: for training (`prompts.jsonl`) and held
out (`held_out.jsonl`). The base is trained briefly on both domains, each expert longer on one of them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

Example = tuple[str, str]
"""Prompt and answer."""
_CHARACTERS = "0123456789abcdef+=<> "
_END = "<end>"


def examples(seed: int) -> dict[str, list[Example]]:
    """All examples of each domain, in random order."""
    words = ["".join(letters) for letters in itertools.product("abcdef", repeat=3)]
    found = {
        "add": [(f"{a}+{b}=", str(a + b)) for a in range(20) for b in range(20)],
        "reverse": [(f"<{word}>", word[::-1]) for word in words],
    }
    for domain in found.values():
        random.Random(seed).shuffle(domain)
    return found


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and one that ends a response."""
    vocabulary = {token: number for number, token in enumerate([_END, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.06,
    )
    return Qwen3MoeForCausalLM(config)


def fine_tune(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    data: Sequence[Example],
    steps: int,
    seed: int,
) -> float:
    """Train with cross-entropy on the answers; returns the last step's loss."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    loss = torch.zeros(())
    for _ in range(steps):
        rows = [
            tokenizer.encode(p) + tokenizer.encode(a) + [tokenizer.eos_token_id]
            for p, a in rng.choices(data, k=64)
        ]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows])
        prompts = torch.tensor([_prompt_length(row, tokenizer) for row in rows]).unsqueeze(1)
        ends = torch.tensor([len(row) for row in rows]).unsqueeze(1)
        place = torch.arange(width).unsqueeze(0)
        labels = ids.masked_fill((place < prompts) | (place >= ends), -100)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def _prompt_length(row: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> int:
    closing = {tokenizer.convert_tokens_to_ids("="), tokenizer.convert_tokens_to_ids(">")}
    return 1 + next(place for place, token in enumerate(row) if token in closing)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory for models and prompts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400, help="training steps per expert")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    domains, tokenizer = examples(options.seed), make_tokenizer()
    for name, part in (("held_out", slice(0, 40)), ("prompts", slice(40, None))):
        lines = [
            json.dumps({"prompt": prompt, "answer": answer, "domain": domain, "verifier": "exact_match"})
            for domain, pairs in domains.items()
            for prompt, answer in pairs[part]
        ]
        (options.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    training = {domain: pairs[40:] for domain, pairs in domains.items()}
    base = make_model(tokenizer, options.seed)
    fine_tune(base, tokenizer, [pair for pairs in training.values() for pair in pairs], options.steps // 5, 0)
    trained = {"base": base}
    for domain, pairs in training.items():
        expert = trained[f"{domain}-expert"] = copy.deepcopy(base)
        loss = fine_tune(expert, tokenizer, pairs, options.steps, options.seed)
        print(f"{domain}-expert: cross-entropy {loss:.3f} after {options.steps} steps")
    for name, model in trained.items():
        model.save_pretrained(options.output / name)
        tokenizer.save_pretrained(options.output / name)
        print(options.output / name)


if __name__ == "__main__":
    main()
