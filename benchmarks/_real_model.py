"""Shared parts of the checks on a real model: prompts, and one of our models on the CPU in this process."""

from __future__ import annotations

from pathlib import Path

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.backend.parallel import ParallelGroups, build_parallel_groups, select_device, start_ranks
from megatron_mopd.config import config_from_dict
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.tokenizer import Tokenizer
from megatron_mopd.model.build import build_model
from megatron_mopd.model.checkpoint import find_checkpoint, load_weights, read_architecture
from megatron_mopd.rollout.megatron_engine import MegatronEngine

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a ten-year-old in three sentences.",
    "List three uses of a paper clip.",
    "What is 17 times 3? Show how you get there.",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet, and what is it about?",
    "Translate 'good morning' into Spanish, Italian and German.",
    "Write a Python function that reverses a string.",
    "Why is the sky blue?",
]
TOPICS = ["rivers", "bicycles", "volcanoes", "chess", "bread", "owls", "magnets", "the moon"]


def conversations(count: int) -> list[str]:
    """Make `count` different questions."""
    made = [f"{question} Mention {topic}." for topic in TOPICS for question in QUESTIONS]
    return (QUESTIONS + made)[:count]


def prompts(count: int, tokenizer: Tokenizer) -> list[Prompt]:
    """Render the questions with the chat template."""
    made = []
    for index, text in enumerate(conversations(count)):
        token_ids = tuple(tokenizer.encode_prompt([{"role": "user", "content": text}]))
        made.append(Prompt(text, token_ids, "-", None, "none", None, index, text))
    return made


class OurModel:
    """A checkpoint of either format in float32 on the CPU, one rank."""

    def __init__(
        self,
        checkpoint: str | Path,
        groups: ParallelGroups,
        max_sequence_length: int,
        max_batch_size: int = 64,
    ):
        self.groups = groups
        path = find_checkpoint(checkpoint, "--hf")
        self.model = read_architecture(path, "--hf")
        self.chunks = build_model(self.model, self.groups, "float32", max_sequence_length=max_sequence_length)
        load_weights(self.chunks, path, self.groups, "--hf")
        self.engine = MegatronEngine(
            self.chunks,
            self.groups,
            vocab_size=self.model.vocab_size,
            max_sequence_length=max_sequence_length,
            max_batch_size=max_batch_size,
        )


def start() -> ParallelGroups:
    """The CPU backend and the groups of a single rank; call once in a process."""
    device = select_device("cpu")
    start_ranks(device, timeout_minutes=1)
    return build_parallel_groups(config_from_dict({"run_dir": "unused"}).parallel, device, seed=1)
