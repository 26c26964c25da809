"""Answer prompts with one of our checkpoints or a Hugging Face directory, using the trainer's rollout engine.

    python tools/generate.py --checkpoint DIR --prompt "What is the capital of France?"
    torchrun --nproc-per-node 2 tools/generate.py ... parallel.tensor_model_parallel_size=2

Prompts are rendered with the tokenizer's chat template, if it has one and `--plain` is not given. A single
answer is printed while it is generated; several are printed one after another. On a terminal, control
characters in an answer are escaped (`\\x1b`), because they would act on it; a file or a pipe gets the
unchanged answer.
"""

import argparse
import sys

import torch.distributed as dist

from megatron_mopd.backend.messages import visible
from megatron_mopd.backend.parallel import build_parallel_groups, select_device, validate_layout
from megatron_mopd.commands.ranks import run_on_ranks
from megatron_mopd.config import load_config
from megatron_mopd.data.exchange import gather_tokens
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mopd.model.build import build_model
from megatron_mopd.model.checkpoint import (
    find_checkpoint,
    load_weights,
    read_architecture,
    tokenizer_directory,
)
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.rollout.megatron_engine import MegatronEngine
from megatron_mopd.rollout.stop_ids import model_directories, read_stop_ids
from megatron_mopd.run.run_date import agreed_date


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="either format")
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--system", help="system message before each prompt")
    parser.add_argument("--plain", action="store_true", help="continue the text without a chat template")
    parser.add_argument("--tokenizer", help="tokenizer directory; default: the checkpoint's own")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("layout", nargs="*", metavar="parallel.KEY=N")
    arguments = parser.parse_args()
    overrides = [
        "run_dir=unused",
        f"params_dtype={arguments.dtype}",
        f"device={arguments.device}",
        f"rollout.max_new_tokens={arguments.max_new_tokens}",
        f"rollout.temperature={arguments.temperature}",
        f"rollout.top_p={arguments.top_p}",
        f"rollout.top_k={arguments.top_k}",
        *arguments.layout,
    ]
    run_on_ranks(
        lambda: generate(arguments, load_config(None, overrides)),
        device=lambda: select_device(arguments.device),
        reads=[arguments.checkpoint],
    )


def generate(arguments, config) -> None:
    path = find_checkpoint(arguments.checkpoint, "--checkpoint")
    model = read_architecture(path, "--checkpoint")
    tokenizer = load_tokenizer(arguments.tokenizer or tokenizer_directory(path), agreed_date())
    prompts = [encode(text, number, tokenizer, arguments) for number, text in enumerate(arguments.prompt)]
    longest = max(len(prompt.token_ids) for prompt in prompts) + arguments.max_new_tokens
    validate_layout(
        config.parallel,
        dist.get_world_size(),
        num_layers=model.transformer["num_layers"],
        num_moe_experts=model.transformer.get("num_moe_experts"),
        num_attention_heads=model.transformer["num_attention_heads"],
        num_query_groups=model.transformer.get("num_query_groups"),
    )
    groups = build_parallel_groups(config.parallel, select_device(config.device), arguments.seed)
    chunks = build_model(
        model, groups, config.params_dtype, max_sequence_length=longest, where="--checkpoint"
    )
    load_weights(chunks, path, groups, "--checkpoint")
    engine = MegatronEngine(
        chunks,
        groups,
        vocab_size=min(model.vocab_size, tokenizer.vocab_size),  # rows beyond are not tokens
        max_sequence_length=longest,
        max_batch_size=max(len(prompts), groups.pp_size),
    )
    stop_ids = read_stop_ids(tokenizer, model_directories(path), config.rollout.stop_token_ids)
    if groups.rank == 0:
        # On stderr, because the answers may go into a file.
        print(f"answers end with {visible(stop_ids.described(tokenizer))}", file=sys.stderr)
    sampling = SamplingParams.from_config(config.rollout, stop_ids)
    writer = Writer(tokenizer) if len(prompts) == 1 and groups.rank == 0 else None
    answers = engine.generate(
        prompts, sampling, seed=arguments.seed, on_token=writer.take if writer is not None else None
    )
    if writer is not None:
        writer.finish()
    elif len(prompts) > 1:
        answers = gather_tokens(answers, groups.dp)  # each rank has the tokens that it sampled
        for answer in answers if groups.rank == 0 else ():
            print(for_output(f"[{answer.prompt.index}] {arguments.prompt[answer.prompt.index]}"))
            print(for_output(tokenizer.decode(answer.response_ids.tolist()).strip()) + "\n")


def encode(text: str, number: int, tokenizer: Tokenizer, arguments) -> Prompt:
    """The prompt's tokens, rendered with the chat template if there is one."""
    if arguments.plain or not (tokenizer.has_chat_template or arguments.system):
        conversation = text
    else:
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        conversation = [*system, {"role": "user", "content": text}]
    token_ids = tokenizer.encode_prompt(conversation)
    return Prompt(text, token_ids, "-", None, "none", None, number, f"--prompt {text!r}")


def for_output(text: str) -> str:
    """A model's output for stdout: escaped on a terminal, unchanged otherwise."""
    return visible(text, keep_lines=True) if sys.stdout.isatty() else text


class Writer:
    """Prints an answer as it grows: the part of its text that later tokens cannot change."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._ids, self._printed = tokenizer, [], 0

    def take(self, index: int, token: int) -> None:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\ufffd"):  # else in the middle of a character
            self._print(text)

    def finish(self) -> None:
        self._print(self._tokenizer.decode(self._ids))
        print()

    def _print(self, text: str) -> None:
        sys.stdout.write(for_output(text[self._printed :]))
        sys.stdout.flush()
        self._printed = max(self._printed, len(text))


if __name__ == "__main__":
    main()
