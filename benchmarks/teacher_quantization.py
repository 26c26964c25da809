"""The accuracy of teachers stored in 8 bits: the divergence from the exact teacher, and its effect on the
objective.

    python benchmarks/teacher_quantization.py --student DIR --experts RUN [RUN ...] [--prompts 64]

RUN is the directory of a run that trained an expert (`make demo` leaves twelve in `experts/`): its last
checkpoint is the teacher, and the prompts come from its configuration. The student samples the responses, as
in a distillation run, and every teacher scores them as the bank loads it: in float32, and from int8 and fp8
storage (with a scale for each 128 weights). Results are means over all response tokens, in float64.

KL(teacher || stored) is the storage error; KL(student || teacher) is the objective with either.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from _real_model import OurModel, start

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.config import TeacherStorageConfig, load_config
from megatron_mopd.data.prompts import load_prompts
from megatron_mopd.data.tokenizer import load_tokenizer
from megatron_mopd.model.checkpoint import find_checkpoint, read_architecture
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.teachers.bank import TeacherBank, TeacherSource

LONGEST = 128
FORMATS = (None, "int8", "fp8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", required=True, help="checkpoint that samples the responses")
    parser.add_argument("--experts", nargs="+", required=True, help="run directories of trained experts")
    parser.add_argument("--tokenizer", default=None, help="default: that of the experts' configurations")
    parser.add_argument("--prompts", type=int, default=64, help="responses for each expert")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    groups = start()
    student = OurModel(arguments.student, groups, LONGEST)
    print("                          float32           int8               fp8")
    print("expert                    KL to student     KL, top-1, KL to student, for each")
    rows = [measure(Path(run), student, groups, arguments) for run in arguments.experts]
    print_row("mean", [sum(column) / len(rows) for column in zip(*rows)])


def print_row(name: str, values: list[float]) -> None:
    plain, *rest = values
    text = f"{name:24}  {plain:8.5f}"
    for first in (0, 3):
        lost, same, seen = rest[first : first + 3]
        text += f"   {lost:.1e}  {same:7.3%}  {seen:8.5f}"
    print(text, flush=True)


@torch.no_grad()
def measure(run: Path, student: OurModel, groups, arguments) -> list[float]:
    """[KL(student || teacher)], then for each format KL(teacher || stored), the top-1 agreement, and
    KL(student || stored)."""
    config = load_config(str(run / "config.yaml"), [])
    tokenizer = load_tokenizer(arguments.tokenizer or config.data.tokenizer)
    prompts = list(load_prompts(config.data.prompts, tokenizer, LONGEST))[: arguments.prompts]
    sampling = SamplingParams(48, stop_token_ids=(tokenizer.eos_id,))
    samples = student.engine.generate(prompts, sampling, seed=1)
    (chunk,) = student.chunks
    vocabulary = student.model.vocab_size
    own = scores(chunk, chunk.head_weight()[:vocabulary], samples)

    checkpoint = str(run / "checkpoints")
    model = read_architecture(find_checkpoint(checkpoint, "--experts"), "--experts")
    source = TeacherSource(run.name, replace(model, load=checkpoint), 0)
    found = {}
    for dtype in FORMATS:
        bank = TeacherBank([source], groups, "float32", LONGEST, TeacherStorageConfig(dtype=dtype))
        found[dtype] = scores(bank.make_resident(run.name), bank.head(run.name)[:vocabulary], samples)
    plain = found[None]
    values = [divergence(own, plain)]
    for dtype in FORMATS[1:]:
        same = (plain.argmax(-1) == found[dtype].argmax(-1)).double().mean().item()
        values += [divergence(plain, found[dtype]), same, divergence(own, found[dtype])]
    print_row(run.name, values)
    return values


def scores(model, head, samples) -> torch.Tensor:
    """Log-probs of the whole vocabulary at every response position, [tokens, vocabulary] float64."""
    model.eval()
    result = []
    for sample in samples:
        ids = torch.tensor([sample.token_ids.tolist()])
        hidden = model(ids, torch.arange(ids.size(1)).unsqueeze(0), None)[:, 0]
        first = len(sample.prompt.token_ids) - 1
        result.append((hidden[first:-1] @ head.T).double().log_softmax(-1))
    return torch.cat(result)


def divergence(left: torch.Tensor, right: torch.Tensor) -> float:
    """KL(left || right), mean over tokens."""
    return (left.exp() * (left - right)).sum(-1).mean().item()


if __name__ == "__main__":
    main()
