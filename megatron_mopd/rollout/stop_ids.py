"""Stop tokens: all that a model's directory and the run's configuration name.

Published chat models often name one end-of-sequence token in the tokenizer and several in
`generation_config.json`; `transformers` and vLLM stop at any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mopd.backend.messages import shown
from megatron_mopd.backend.model_files import read_mapping
from megatron_mopd.config import ConfigError
from megatron_mopd.data.tokenizer import Tokenizer
from megatron_mopd.model.checkpoint import HUGGING_FACE_DIRECTORY, tokenizer_directory

_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class StopIds:
    """Token id -> the sources that name it, in the order in which they were found."""

    sources: dict[int, tuple[str, ...]]

    def __iter__(self):
        return iter(sorted(self.sources))

    def described(self, tokenizer: Tokenizer) -> str:
        """For the terminal: `2 '<|im_end|>' (tokenizer, config.json), 0 '<|endoftext|>' (...)`."""
        meaning = tokenizer.meaning()
        named = (f"{meaning.token(i)} ({', '.join(where)})" for i, where in self.sources.items())
        return ", ".join(named)


def model_directories(checkpoint: Path) -> list[Path]:
    """Directories with a model's files in a checkpoint, ours or a Hugging Face directory."""
    if tokenizer_directory(checkpoint) == checkpoint:
        return [checkpoint]
    return [checkpoint / HUGGING_FACE_DIRECTORY, tokenizer_directory(checkpoint)]


def read_stop_ids(tokenizer: Tokenizer, directories: Iterable[Path], given: Sequence[int]) -> StopIds:
    """The union of the tokenizer's end-of-sequence token, the `eos_token_id` (a number or a list) of every
    `generation_config.json` and `config.json` in `directories`, and `given` (`rollout.stop_token_ids`).

    Ids that the tokenizer does not have are omitted, because they are never sampled. Raises `ConfigError` for
    an unreadable file, or an `eos_token_id` that is neither. No collectives.
    """
    named = [("tokenizer", [tokenizer.eos_id])]
    for directory in directories:
        named += [(name, _eos_ids(directory, name)) for name in _FILES]
    named.append(("rollout.stop_token_ids", given))
    sources: dict[int, tuple[str, ...]] = {}
    for name, ids in named:
        for token_id in ids:
            before = sources.get(token_id, ())
            if 0 <= token_id < tokenizer.vocab_size and name not in before:
                sources[token_id] = (*before, name)
    return StopIds(sources)


def _eos_ids(directory: Path, name: str) -> list[int]:
    try:
        value = read_mapping(directory, name, str(directory)).get("eos_token_id")
    except (FileNotFoundError, NotADirectoryError):
        return []
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise ConfigError(
            f"{directory / name}: eos_token_id is {shown(value)}; expected a token id or a list of them"
        )
    return ids
