"""Tokens per second of in-process generation and of `transformers.generate`: same prompts, same run.

    python benchmarks/generation.py --hf DIR [--batch-size 1 8 32]     # part of `make real-model`

Both decode greedily with a KV cache in float32 on the CPU, on one thread (`--threads`) like a rank of a job,
and alternate: the ratios are medians over the turns, in wall-clock and in CPU time, which is less sensitive
to other load on the machine. Prompts have different lengths and a common prefix (the chat template). The
first part generates an exact number of tokens, the second up to `--until-stop` tokens per prompt, where only
tokens up to a response's first stop token count. The last part measures the limit: the speed if decoding were
only its matrix products, in wall-clock time, with plain weights and with weights in panels.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from _real_model import OurModel, prompts, start

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.backend.packed_weights import PackedWeights
from megatron_mopd.data.tokenizer import load_tokenizer
from megatron_mopd.rollout.engine import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, help="Hugging Face directory of the model")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--until-stop", type=int, default=128, help="maximum tokens of the second part; 0 skips it"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()

    theirs = transformers.AutoModelForCausalLM.from_pretrained(arguments.hf, dtype=torch.float32).eval()
    groups = start()  # after the other model: it changes CPU settings of `torch`
    tokenizer = load_tokenizer(arguments.hf)
    asked = prompts(max(arguments.batch_size), tokenizer)
    most = max(arguments.new_tokens, arguments.until_stop)
    ours = OurModel(arguments.hf, groups, max(len(prompt.token_ids) for prompt in asked) + most)

    threads = torch.get_num_threads()
    print(f"{threads} thread(s), float32, {torch.backends.cpu.get_cpu_capability()}; tokens per second")
    print(f"{'batch':>5}  {'tokens':<12}  {'transformers':>12}  {'ours':>8}  ratio   CPU time  same tokens")
    for stop, most in ((False, arguments.new_tokens), (True, arguments.until_stop)):
        for size in arguments.batch_size if most else ():
            stops = (tokenizer.eos_id,) if stop else ()
            compare(theirs, ours, asked[:size], tokenizer, most, stops, arguments.repeats)
    for size in arguments.batch_size:
        limit(ours, size, arguments.repeats)


def compare(theirs, ours, batch, tokenizer, most: int, stops: tuple[int, ...], repeats: int) -> None:
    """Print one line: `most` tokens per prompt, or up to the first of `stops`."""
    sampling = SamplingParams(most, temperature=0.0, stop_token_ids=stops)
    took = {"theirs": [], "ours": []}  # (wall seconds, CPU seconds) of every turn
    answers = {}
    for _ in range(repeats):
        for name, generate in (
            ("theirs", lambda: generate_with_transformers(theirs, batch, most, tokenizer, stops)),
            (
                "ours",
                lambda: [a.response_ids.tolist() for a in ours.engine.generate(batch, sampling, seed=0)],
            ),
        ):
            *seconds, answers[name] = timed(generate)
            took[name].append(seconds)
    same = sum(list(a) == list(b) for a, b in zip(answers["ours"], answers["theirs"], strict=True))
    tokens = sum(map(len, answers["ours"]))
    speeds = [tokens / statistics.median(clock for clock, _ in took[name]) for name in ("theirs", "ours")]
    clock, processor = (
        statistics.median(a[i] / b[i] for a, b in zip(took["theirs"], took["ours"])) for i in (0, 1)
    )
    what = f"to stop, {most}" if stops else f"{most}"
    print(
        f"{len(batch):>5}  {what:<12}  {speeds[0]:>10.1f}/s  {speeds[1]:>6.1f}/s  {clock:>5.2f}  "
        f"{processor:>9.2f}  {same} of {len(batch)}",
        flush=True,
    )


def generate_with_transformers(model, batch, most: int, tokenizer, stops=()) -> list[list[int]]:
    """Greedy continuations of left-padded prompts with the default cache, truncated after the first stop
    token."""
    longest = max(len(prompt.token_ids) for prompt in batch)
    rows = [[tokenizer.pad_id] * (longest - len(p.token_ids)) + list(p.token_ids) for p in batch]
    mask = [[0] * (longest - len(p.token_ids)) + [1] * len(p.token_ids) for p in batch]
    output = model.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        max_new_tokens=most,
        min_new_tokens=None if stops else most,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=tokenizer.pad_id,
    )
    answers = output[:, longest:].tolist()
    ends = [next((i + 1 for i, token in enumerate(a) if token in stops), len(a)) for a in answers]
    return [answer[:end] for answer, end in zip(answers, ends)]


def limit(ours: OurModel, rows: int, repeats: int) -> None:
    """Tokens per second if a decoding step were only its matrix products, in wall-clock time."""
    chunk = ours.chunks[0]
    linears = [m.weight for m in chunk.modules() if hasattr(m, "_forward_impl") and m.weight is not None]
    weights = [*{id(w): w for w in [*linears, chunk.head_weight()]}.values()]
    inputs = {w.size(1): torch.randn(1, rows, w.size(1)) for w in weights}
    packed = PackedWeights(weights)

    def step(linear) -> None:
        for weight in weights:
            linear(inputs[weight.size(1)], weight)

    with torch.no_grad():
        speeds = [
            rows / min(timed(lambda: step(linear))[0] for _ in range(3 * repeats))  # noqa: B023
            for linear in (F.linear, packed.linear)
        ]
    print(
        f"batch {rows}: the matrix products of decoding alone would give {speeds[0]:.1f}/s with plain "
        f"weights, {speeds[1]:.1f}/s with packed ones",
        flush=True,
    )


def timed(function: Callable) -> tuple[float, float, object]:
    """(wall-clock seconds, CPU seconds, result)."""
    clock, processor = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - clock, time.process_time() - processor, result


if __name__ == "__main__":
    main()
