"""A common interface to SentencePiece models and Hugging Face tokenizer directories.

``load_tokenizer(path)`` takes a SentencePiece ``.model`` file, a directory with ``tokenizer.model``, or a
Hugging Face tokenizer directory. Nothing is downloaded, and no code from a directory is executed.
``train_sentencepiece`` trains a small tokenizer on texts.
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
# Either file makes a directory a Hugging Face tokenizer; a `tokenizer.model` next to it is then one of its
# files.
_HUGGING_FACE_MARKERS = ("tokenizer.json", "tokenizer_config.json")
# Files that may define a Hugging Face tokenizer. `config.json` is read for `model_type`, which determines the
# class.
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
"""A text that every tokenizer must be able to encode, or it is rejected before the run: letters, digits, and
characters without their own token in most vocabularies."""

_LOAD_SECONDS = 120.0
_TEXT_SECONDS = 60.0
"""Time limit of a tokenizer for one text; a megabyte of text takes about a second."""
_RENDERING = "megatron_mopd.data.rendering"
_RENDER_SECONDS = 10.0
"""Time limit of a chat template for one prompt."""


class Tokenizer(Protocol):
    """The tokenizer interface used throughout the package."""

    vocab_size: int
    """Number of token ids: the largest id plus one, without the model's padding."""
    eos_id: int
    """The token that ends a response."""
    pad_id: int
    """Fills unused positions; the end-of-sequence token if the tokenizer has no padding token."""
    bos_id: int | None
    """The token that begins a prompt; `None` if the tokenizer has none or does not use it."""
    has_chat_template: bool
    """Whether messages are rendered with the tokenizer's own chat template."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens before or after."""

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a prompt: text as it is, messages through the chat template.

        Plain text is preceded by `bos_id` if there is one. Messages end with the template's opening of the
        assistant's turn. Raises `ConfigError` if the template is missing or rejects the messages.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens and ids unknown to the tokenizer."""

    def meaning(self) -> TokenizerMeaning:
        """The basis on which tokenizers are compared; computed once, which takes seconds for 150,000
        tokens."""

    def fingerprint(self) -> str:
        """SHA-256 of everything that gives ids and prompts their meaning (`TokenizerMeaning.fingerprint`):
        equal for the same tokenizer, wherever it is stored and whichever release wrote it."""

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer into `directory`, so that `load_tokenizer(directory)` gives it back."""


class SentencePieceTokenizer:
    """A SentencePiece model; see `Tokenizer` for the methods.

    A SentencePiece model has no chat template: each message becomes a line ``role: content``, and the prompt
    ends with ``assistant: ``.
    """

    def __init__(self, model_file: str | Path):
        check_size(Path(model_file))
        try:
            self._proto = Path(model_file).read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
            self.vocab_size = self._processor.vocab_size()
            pieces = self._processor.id_to_piece(list(range(self.vocab_size)))  # fails if one is not text
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
        # SentencePiece raises for an unknown id, and a model can have more rows than the tokenizer has ids.
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
        """date: today's date for chat templates, YYYY-MM-DD; default: the actual date."""
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
            # Not len(vocab): ids may have gaps, and every id must be a row of the embedding.
            self.vocab_size = max(self._vocab.values()) + 1
            self.decode(self.encode(_PROBE))
            first = within(_TEXT_SECONDS, self._tokenizer, "a")["input_ids"][:1]
        except ConfigError:
            raise
        except Exception as error:  # whatever a broken directory raises, report it as a user error
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
            raise ConfigError(f"{self._directory}: chat template: does not render to text")
        return self.encode(text)  # the template writes its own special tokens

    def decode(self, ids: Sequence[int]) -> str:
        decode = functools.partial(
            self._tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return self._limited("decoding", [i for i in ids if 0 <= i < self.vocab_size], decode)

    def _templates(self) -> ConfinedProcess:
        """The process that renders this tokenizer's chat templates; each forked rank gets its own."""
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
        """The chat template for prompts; several named templates without a default count as one."""
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
        # A model saved in the same directory has its own config.json, which must not be overwritten.
        config = self._directory / "config.json"
        if config.exists() and not (target / "config.json").exists():
            _copy(self._directory, Path("config.json"), target / "config.json")


def _copy(directory: Path, name: Path, target: Path) -> None:
    """Copy the content of one file of a tokenizer directory; `ConfigError` for a link out of the
    directory."""
    data = read_limited(directory, name, JSON_LIMIT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def load_tokenizer(path: str | Path, date: str | None = None) -> Tokenizer:
    """The tokenizer at `path`: a SentencePiece `.model` file, or a directory of one or of Hugging Face files.

    date: today's date for its chat template, YYYY-MM-DD; default: the actual date. Raises `ConfigError` if
    the path does not exist or contains no tokenizer.
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
    raise ConfigError(f"{path}: contains no tokenizer (none of {expected})")


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

    Text is unchanged by a round trip, including runs of spaces and newlines (the one exception is U+2581,
    which SentencePiece itself uses for a space). Digits are single tokens, unseen characters are encoded as
    bytes, and ids 0 to 3 are padding, unknown, beginning and end of sequence. `whole_pieces` are texts of any
    length that become one token each wherever they occur. The same texts in the same order give the same
    file; with `unigram` that requires a single thread. The vocabulary has at most `vocab_size` ids, including
    `whole_pieces` (fewer if there are too few texts). Raises `ConfigError` if `vocab_size` is too small for
    the alphabet, the 256 bytes and the special tokens.
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
            max_sentence_length=1 << 20,  # longer texts would be silently dropped
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            # SentencePiece writes a space as U+2581, also in user-defined symbols.
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
