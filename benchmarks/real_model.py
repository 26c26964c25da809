"""Check a real model against `transformers`: the same logits and answers, before and after upcycling.

    python benchmarks/real_model.py --hf DIR [--work DIR]        # part of `make real-model`

Compares, in float32 on the CPU: logits on ten chat prompts, greedy continuations of 64 tokens, the files
after a round-trip conversion (bit by bit), and the logits of the model upcycled to 4 experts with top-2
routing; then lets `tools/generate.py` answer one question. Exits with status 1 if anything differs.
"""

import argparse
import filecmp
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import transformers
from _real_model import OurModel, prompts, start

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.data.tokenizer import load_tokenizer
from megatron_mopd.model.convert import open_checkpoint, write_hugging_face, write_megatron
from megatron_mopd.model.upcycle import UpcycledModel, Upcycling
from megatron_mopd.rollout.engine import SamplingParams

NEW_TOKENS, LOGITS_TOLERANCE = 64, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, help="Hugging Face directory of the model")
    parser.add_argument("--work", default="runs/real-model", help="directory for conversions")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    hf, work = Path(arguments.hf), Path(arguments.work)
    megatron, back, moe = (work / name for name in ("megatron", "back", "moe"))
    for directory in (megatron, back, moe):
        shutil.rmtree(directory, ignore_errors=True)

    tokenizer = load_tokenizer(hf)
    asked = prompts(10, tokenizer)
    reference = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    expected = [logits_of_transformers(reference, prompt.token_ids.tolist()) for prompt in asked]
    assert all(logits.isfinite().all() for logits in expected), "transformers' own logits are not finite"
    groups = start()  # after the reference: it changes CPU settings of `torch`
    longest = max(len(prompt.token_ids) for prompt in asked) + NEW_TOKENS
    ok = True

    def check(name: str, passed: bool, detail: str) -> None:
        nonlocal ok
        ok &= passed
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {detail}", flush=True)

    def check_logits(name: str, model: OurModel) -> None:
        worst = max(
            (logits_of_ours(model, prompt.token_ids.tolist()) - wanted).abs().max().item()
            for prompt, wanted in zip(asked, expected, strict=True)
        )
        check(name, worst < LOGITS_TOLERANCE, f"largest difference {worst:.1e} (limit {LOGITS_TOLERANCE:g})")

    ours = OurModel(hf, groups, longest)
    check_logits("logits, read from the Hugging Face directory", ours)
    equal, detail = compare_greedy(reference, ours, asked, tokenizer)
    check(f"greedy continuations of {NEW_TOKENS} tokens", equal, detail)

    write_megatron(open_checkpoint(hf, "--hf"), megatron)
    write_hugging_face(open_checkpoint(megatron, "--hf"), back)
    names = sorted(file.name for file in hf.iterdir())
    same = filecmp.cmpfiles(hf, back, names, shallow=False)[0]
    check(
        "round-trip conversion, bit by bit",
        sorted(same) == names,
        f"{len(same)} of {len(names)} files are equal",
    )
    check_logits("logits, read from the converted checkpoint", OurModel(megatron, groups, longest))

    options = Upcycling(num_experts=4, topk=2, router_noise=0.01)
    write_megatron(UpcycledModel(open_checkpoint(megatron, "--hf"), options, "--hf"), moe)
    check_logits("logits, upcycled to 4 experts top-2", OurModel(moe, groups, longest))

    tool = Path(__file__).parents[1] / "tools" / "generate.py"
    question = "What is the capital of France?"
    command = [sys.executable, tool, "--checkpoint", moe, "--prompt", question, "--max-new-tokens", "48"]
    answer = subprocess.run(command, capture_output=True, text=True)
    said = answer.stdout.strip() or answer.stderr.strip()
    check(f"tools/generate.py, {question!r}", "Paris" in said, answer.stdout.strip() or answer.stderr)
    sys.exit(0 if ok else 1)


@torch.no_grad()
def logits_of_transformers(model, token_ids) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0]


@torch.no_grad()
def logits_of_ours(model: OurModel, token_ids) -> torch.Tensor:
    (chunk,) = model.chunks
    chunk.eval()
    hidden = chunk(torch.tensor([token_ids]), torch.arange(len(token_ids)).unsqueeze(0), None)
    return (hidden[:, 0] @ chunk.head_weight().T)[:, : model.model.vocab_size]


def compare_greedy(reference, ours: OurModel, asked, tokenizer) -> tuple[bool, str]:
    """Whether both continue every prompt identically; ours in one padded batch, theirs one by one."""
    sampling = SamplingParams(NEW_TOKENS, temperature=0.0, stop_token_ids=(tokenizer.eos_id,))
    answers = ours.engine.generate(asked, sampling, seed=0)
    equal = 0
    for prompt, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([prompt.token_ids.tolist()])
        wanted = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        )
        equal += wanted[0, ids.size(1) :].tolist() == list(answer.response_ids)
    return equal == len(asked), f"{equal} of {len(asked)} prompts have the same continuation"


if __name__ == "__main__":
    main()
