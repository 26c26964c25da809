"""One interface over SentencePiece models and Hugging Face tokenizer directories.

``load_tokenizer(path)`` takes a SentencePiece ``.model`` file, a directory with ``tokenizer.model``, or a
Hugging Face tokenizer directory. Nothing is ever downloaded, no code from a directory is ever executed.
``train_sentencepiece`` makes a small tokenizer from texts.
"""

from __future__ import annotations

import datetime
import functools
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import transformers

from megatron_mopd.backend.model_files import JSON_LIMIT, read_limited
from megatron_mopd.config import ConfigError
from megatron_mopd.confinement.budget import within
from megatron_mopd.confinement.process import ConfinedProcess, Unanswered
from megatron_mopd.data.tokenizer_files import check_size, check_tokenizer_files, check_tokens
from megatron_mopd.data.tokenizer_meaning import TokenizerMeaning, probe

Message = dict[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""

_SENTENCEPIECE_NAME = "tokenizer.model"
# Either makes a directory a Hugging Face tokenizer; a `tokenizer.model` beside it is then one of its files.
_HUGGING_FACE_MARKERS = ("tokenizer.json", "tokenizer_config.json")
# What may define a Hugging Face tokenizer. `config.json` is read for `model_type`, which decides the class.
_HUGGING_FACE_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.*",
    "additional_chat_templates",
)
_PROBE = "a Z 0 9 + \u00e9 \u6f22 \n"
"""What a tokenizer has to be able to cut into tokens, or be refused before a run: letters, digits, and what
most vocabularies have no token of its own for."""

_LOAD_SECONDS = 120.0
_TEXT_SECONDS = 60.0
"""How long a tokenizer may take for one text; a megabyte of text takes about a second."""
_RENDERING = "megatron_mopd.data.rendering"
_RENDER_SECONDS = 10.0
"""How long a chat template may take for one prompt."""


class Tokenizer(Protocol):
    """What the rest of the house may ask of a tokenizer."""

    vocab_size: int
    """Number of token ids, the largest id plus one; the model's padding is not counted."""
    eos_id: int
    """The token that ends a response."""
    pad_id: int
    """Fills unused positions; the end-of-sequence token where the tokenizer has no padding token."""
    bos_id: int | None
    """The token that begins a prompt; `None` where the tokenizer has none or does not use it."""
    has_chat_template: bool
    """Messages go through a template of the tokenizer's own."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone: nothing is added before or after."""

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids that a response follows: text as it stands, messages through the chat template.

        Plain text is preceded by `bos_id` where there is one. Messages end with the template's opening of the
        assistant's turn. Raises `ConfigError` when the template is missing or refuses the messages.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out, and ids that are none of the tokenizer's."""

    def meaning(self) -> TokenizerMeaning:
        """What two tokenizers are compared by; made once, which takes seconds for 150,000 tokens."""

    def fingerprint(self) -> str:
        """SHA-256 of all that gives ids and prompts their meaning (`TokenizerMeaning.fingerprint`): equal for
        the same tokenizer, wherever it lies and whichever release wrote it."""

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer into `directory`, so that `load_tokenizer(directory)` gives it back."""


class SentencePieceTokenizer:
    """A SentencePiece model; see `Tokenizer` for the methods.

    A SentencePiece model has no chat template: messages become one line ``role: content`` each, and the
    prompt ends with ``assistant: ``.
    """

    def __init__(self, model_file: str | Path):
        check_size(Path(model_file))
        try:
            self._proto = Path(model_file).read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
            self.vocab_size = self._processor.vocab_size()
            pieces = self._processor.id_to_piece(list(range(self.vocab_size)))  # every piece is text
            self._processor.encode(_PROBE)
        except (OSError, RuntimeError, ValueError) as error:  # ValueError: text that is not UTF-8
            raise ConfigError(f"{model_file}: not a SentencePiece model: {_one_line(error)}") from None
        check_tokens(pieces, Path(model_file))
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise ConfigError(f"{model_file}: the SentencePiece model has no end-of-sequence token")
        pad_id, bos_id = self._processor.pad_id(), self._processor.bos_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self.bos_id = bos_id if bos_id >= 0 else None
        self.has_chat_template = False

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        if not isinstance(prompt, str):
            prompt = "".join(f"{turn['role']}: {turn['content']}\n" for turn in prompt) + "assistant: "
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        # SentencePiece raises for an id that it does not have; a model can have more rows than that.
        return self._processor.decode([i for i in ids if 0 <= i < self.vocab_size])

    @functools.cached_property
    def _meaning(self) -> TokenizerMeaning:
        processor, ids = self._processor, range(self.vocab_size)
        special = frozenset(i for i in ids if processor.is_control(i))
        tokens = dict(zip(ids, processor.id_to_piece(list(ids)), strict=True))
        encoded = probe(tokens, special | {processor.unk_id()}, self.encode)
        return TokenizerMeaning(
            tokens, special, self.eos_id, None, says_bos=False, chat_template=None, encoded=encoded
        )

    def meaning(self) -> TokenizerMeaning:
        return self._meaning

    def fingerprint(self) -> str:
        return self._meaning.fingerprint()

    def save(self, directory: str | Path) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / _SENTENCEPIECE_NAME).write_bytes(self._proto)


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer directory, read by `transformers`; see `Tokenizer` for the methods."""

    def __init__(self, directory: str | Path, date: str | None = None):
        """date: what chat templates take for today, YYYY-MM-DD; default: today."""
        self._directory = Path(directory)
        self._date = date or datetime.date.today().isoformat()
        self._template_processes: dict[int, ConfinedProcess] = {}
        check_tokenizer_files(self._directory)
        try:
            self._tokenizer = within(
                _LOAD_SECONDS,
                functools.partial(
                    transformers.AutoTokenizer.from_pretrained,
                    str(directory),
                    local_files_only=True,
                    trust_remote_code=False,
                ),
            )
            self._vocab = self._tokenizer.get_vocab()
            check_tokens(self._vocab, self._directory)
            # Not len(vocab): ids may have holes, and every id must be a row of the embedding.
            self.vocab_size = max(self._vocab.values()) + 1
            self.decode(self.encode(_PROBE))
            first = within(_TEXT_SECONDS, self._tokenizer, "a")["input_ids"][:1]
        except ConfigError:
            raise
        except Exception as error:  # whatever a broken directory raises, it is the user's to mend
            raise ConfigError(f"{directory}: not a usable tokenizer directory: {_one_line(error)}") from None
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(f"{directory}: the tokenizer has no end-of-sequence token (eos_token)")
        self.eos_id = self._tokenizer.eos_token_id
        pad_id, bos_id = self._tokenizer.pad_token_id, self._tokenizer.bos_token_id
        self.pad_id = self.eos_id if pad_id is None else pad_id
        # Many tokenizers name a beginning-of-sequence token that they never put before a text.
        self.bos_id = bos_id if bos_id is not None and first == [bos_id] else None
        self.has_chat_template = self._tokenizer.chat_template is not None

    def encode(self, text: str) -> list[int]:
        encode = functools.partial(self._tokenizer.encode, add_special_tokens=False)
        return self._limited("encoding", text, encode)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        if isinstance(prompt, str):
            return ([] if self.bos_id is None else [self.bos_id]) + self.encode(prompt)
        try:
            text = self._templates().ask(
                "render",
                self._tokenizer.get_chat_template(),
                [dict(turn) for turn in prompt],
                {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()},
                self._date,
                seconds=_RENDER_SECONDS,
            )
        except (ValueError, Unanswered) as error:
            raise ConfigError(f"{self._directory}: chat template: {_one_line(error)}") from None
        if not isinstance(text, str):
            raise ConfigError(f"{self._directory}: chat template: renders something else than text")
        return self.encode(text)  # the template writes its own special tokens

    def decode(self, ids: Sequence[int]) -> str:
        decode = functools.partial(
            self._tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return self._limited("decoding", [i for i in ids if 0 <= i < self.vocab_size], decode)

    def _templates(self) -> ConfinedProcess:
        """The process that renders this tokenizer's chat templates; a forked rank gets its own."""
        return self._template_processes.setdefault(os.getpid(), ConfinedProcess(_RENDERING))

    def _limited(self, what: str, argument: Any, function: Callable[[Any], Any]) -> Any:
        try:
            return within(_TEXT_SECONDS, function, argument)
        except (TimeoutError, RuntimeError) as error:
            raise ConfigError(
                f"{self._directory}: {what} a text of {len(argument)}: {_one_line(error)}; "
                "its tokenizer.json is damaged or hostile"
            ) from None

    @functools.cached_property
    def _meaning(self) -> TokenizerMeaning:
        tokens = {number: token for token, number in self._vocab.items()}
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        special.discard(self._tokenizer.unk_token_id)
        special |= {self.eos_id}
        encoded = probe(tokens, frozenset(special), self.encode)
        return TokenizerMeaning(
            tokens,
            frozenset(special),
            self.eos_id,
            self.bos_id,
            says_bos=True,
            chat_template=self._template(),
            encoded=encoded,
        )

    def meaning(self) -> TokenizerMeaning:
        return self._meaning

    def fingerprint(self) -> str:
        return self._meaning.fingerprint()

    def _template(self) -> str | None:
        """The chat template that prompts go through; several under names without a default count as one."""
        if isinstance(template := self._tokenizer.chat_template, dict):
            return template.get("default", json.dumps(template, sort_keys=True))
        return template

    def save(self, directory: str | Path) -> None:
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        for pattern in _HUGGING_FACE_PATTERNS:
            for source in self._directory.glob(pattern):
                templates = source.is_dir() and not source.is_symlink()
                for file in sorted(source.glob("*.jinja")) if templates else [source]:
                    name = file.relative_to(self._directory)
                    if file.resolve() != (target / name).resolve():
                        _copy(self._directory, name, target / name)
        # A model saved beside the tokenizer has its own config.json, which must survive.
        config = self._directory / "config.json"
        if config.exists() and not (target / "config.json").exists():
            _copy(self._directory, Path("config.json"), target / "config.json")


def _copy(directory: Path, name: Path, target: Path) -> None:
    """One file of a tokenizer directory by its content; `ConfigError` for a link out of the directory."""
    data = read_limited(directory, name, JSON_LIMIT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def load_tokenizer(path: str | Path, date: str | None = None) -> Tokenizer:
    """The tokenizer at `path`: a SentencePiece `.model` file, or a directory of one or of Hugging Face files.

    date: what its chat template takes for today, YYYY-MM-DD; default: today.
    Raises `ConfigError` when there is no such path or nothing in it that is a tokenizer.
    """
    location = Path(path)
    if not str(path) or not location.exists():
        raise ConfigError(f"tokenizer not found: {str(path)!r}; give a .model file or a tokenizer directory")
    if location.is_file():
        return SentencePieceTokenizer(location)
    if any((location / name).exists() for name in _HUGGING_FACE_MARKERS):
        return HuggingFaceTokenizer(location, date)
    if (location / _SENTENCEPIECE_NAME).exists():
        return SentencePieceTokenizer(location / _SENTENCEPIECE_NAME)
    expected = ", ".join((*_HUGGING_FACE_MARKERS, _SENTENCEPIECE_NAME))
    raise ConfigError(f"{path}: holds no tokenizer (none of {expected})")


def train_sentencepiece(
    texts: Iterable[str],
    output_path: str | Path,
    vocab_size: int,
    *,
    model_type: str = "bpe",
    num_threads: int = 1,
    whole_pieces: Sequence[str] = (),
) -> SentencePieceTokenizer:
    """Train a SentencePiece model on `texts`, write it to `output_path` and return it.

    Text survives a round trip unchanged, runs of spaces and newlines included (the one exception is U+2581,
    which SentencePiece itself uses for a space). Digits are single tokens, characters never seen are written
    as bytes, and ids 0 to 3 are padding, unknown, beginning and end of sequence. `whole_pieces` are texts of
    any length that become one token each wherever they stand. The same texts in the same order give the same
    file; with `unigram` that needs one thread. The vocabulary has at most `vocab_size` ids, `whole_pieces`
    included (fewer when the texts are too few). Raises `ConfigError` when `vocab_size` is too small for the
    alphabet, the 256 bytes and the special tokens.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            num_threads=num_threads,
            minloglevel=2,
            max_sentence_length=1 << 20,  # longer texts would be left out without a word
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            # SentencePiece writes a space as U+2581, in user-defined symbols too.
            user_defined_symbols=list(
                dict.fromkeys(["\n", *(p.replace(" ", "\u2581") for p in whole_pieces)])
            ),
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
        )
    except RuntimeError as error:
        raise ConfigError(f"{output_path}: SentencePiece training failed: {_one_line(error)}") from None
    Path(output_path).parent.mkdir(parents=True, exist_ok=True)
    Path(output_path).write_bytes(model.getvalue())
    return SentencePieceTokenizer(output_path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
