"""Load prompts, mix their sources, and draw the batch of an iteration.

``load_prompts`` reads JSONL files and generates reasoning-gym tasks; ``PromptSampler`` draws from them. The
prompts of an iteration are determined by the seed and the number of prompts before it (`position.py`), so a
resumed run needs no sampler state.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import os
import stat
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_mopd.backend.messages import shown
from megatron_mopd.config import ConfigError, PromptSource, closest, nearest
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.reasoning_tasks import task_entries
from megatron_mopd.data.tokenizer import Tokenizer
from megatron_mopd.data.verifiers import check_verifier, is_thinking

__all__ = ["Prompt", "PromptSampler", "PromptSet", "load_prompts", "require_answers"]

_LINE_KEYS = ("prompt", "domain", "answer", "verifier")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_NOT_SUPPORTED = frozenset(
    "tools tool_calls tool_call_id tool_choice functions function_call documents reasoning "
    "reasoning_content thinking image images video videos audio audios".split()
)
"""Keys of a line or a message that a chat template would show to the model, but that are not supported."""
_LONGEST_LINE = 16 << 20
_LAST_TOKENS = 32
"""The number of final tokens of a prompt in which a chat template may have opened `<think>`."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of several sources; iterating yields all of them, source by source."""

    groups: tuple[tuple[Prompt, ...], ...]
    """The prompts of each source."""
    weights: tuple[float, ...]
    """Share of each source in a batch, relative to the others."""

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def __iter__(self) -> Iterator[Prompt]:
        return (prompt for group in self.groups for prompt in group)

    @property
    def domains(self) -> tuple[str, ...]:
        """The distinct domains, in order of first appearance."""
        return tuple(dict.fromkeys(prompt.domain for prompt in self))

    def domain_shares(self) -> dict[str, float]:
        """The expected share of each domain in a batch."""
        shares = dict.fromkeys(self.domains, 0.0)
        for group, weight in zip(self.groups, self.weights):
            for prompt in group:
                shares[prompt.domain] += weight / sum(self.weights) / len(group)
        return shares

    def without(self, other: PromptSet) -> PromptSet:
        """These prompts without those that are also in `other`, for evaluation on prompts that were never
        trained on.

        Prompts are compared by their tokens. Raises `ConfigError` if no prompt of a source remains.
        """
        known = {prompt.token_ids.tobytes() for prompt in other}
        groups = tuple(tuple(p for p in group if p.token_ids.tobytes() not in known) for group in self.groups)
        for before, after in zip(self.groups, groups):
            if not after:
                raise ConfigError(
                    f"{before[0].origin}: every prompt of this source is also a training prompt"
                )
        return PromptSet(groups, self.weights)

    def fingerprint(self) -> str:
        """SHA-256 of the data that training reads.

        If it differs between ranks, or between a run and its resumption, the data differ: another file, or
        another release of reasoning-gym.
        """
        return hashlib.sha256(repr((self.weights, self.source_fingerprints())).encode()).hexdigest()

    def source_fingerprints(self) -> list[str]:
        """SHA-256 of the data that training reads from each source."""
        prints = []
        for group in self.groups:
            digest = hashlib.sha256()
            for prompt in group:
                # Of Python numbers, whose text runs of earlier releases have stored in their manifests.
                ids = tuple(prompt.token_ids.tolist())
                read = (ids, prompt.domain, prompt.answer, prompt.verifier)
                digest.update(repr(read).encode())
            prints.append(digest.hexdigest())
        return prints


def load_prompts(
    sources: Sequence[PromptSource], tokenizer: Tokenizer, seq_length: int, where: str = "data.prompts"
) -> PromptSet:
    """Read every source, tokenize its prompts and check them; `where` is the config key of `sources`.

    A prompt must leave room for at least one response token within `seq_length`. Raises `ConfigError` with
    the file and line (or the task and the number of the prompt) of the first error.
    """
    if not sources:
        raise ConfigError(f"{where}: no prompts; list at least one source with a `path` or a `task`")
    groups, start = [], 0
    for number, source in enumerate(sources):
        here = f"{where}[{number}]"
        if (source.path is None) == (source.task is None):
            raise ConfigError(f"{here}: give either `path` (a JSONL file) or `task` (a reasoning-gym task)")
        if not (math.isfinite(source.weight) and source.weight >= 0):
            raise ConfigError(f"{here}.weight: must be a number of at least 0, found {source.weight}")
        if source.verifier is not None:
            check_verifier(source.verifier, f"{here}.verifier")
        read = _from_file if source.path is not None else _from_task
        group = []
        for prompt in read(source, here):
            token_ids = _tokenize(prompt, tokenizer, seq_length)
            opens = is_thinking(tokenizer.decode(token_ids[-_LAST_TOKENS:]))
            here_is = {"token_ids": token_ids, "opens_thinking": opens, "index": start + len(group)}
            group.append(replace(prompt, **here_is))
        groups.append(tuple(group))
        start += len(group)
    if not any(source.weight > 0 for source in sources):
        raise ConfigError(f"{where}: every source has weight 0")
    return PromptSet(tuple(groups), tuple(source.weight for source in sources))


def require_answers(
    prompts: PromptSet, tokenizer: Tokenizer, seq_length: int, domains: Collection[str] | None = None
) -> None:
    """Check that every prompt of `domains` (default: all) can be trained on with cross-entropy (`sft`).

    Each needs an `answer` that, together with the prompt and the end-of-sequence token, fits `seq_length`;
    otherwise `ConfigError` names the first prompt without one.
    """
    for prompt in prompts:
        if domains is not None and prompt.domain not in domains:
            continue
        if prompt.answer is None:
            raise ConfigError(f"{prompt.origin}: objective `sft` needs an `answer` for every prompt")
        length = len(prompt.token_ids) + len(tokenizer.encode(prompt.answer)) + 1
        if length > seq_length:
            raise ConfigError(
                f"{prompt.origin}: prompt and answer have {length} tokens, data.seq_length is {seq_length}"
            )


class PromptSampler:
    """Draws the prompts of each iteration, as a pure function of the seed and the number drawn before.

    Sources are mixed by the divisor method of Sainte-Laguë over the whole run: after any number of draws each
    source has its exact share up to rounding, and later batches make up for the rounding of earlier ones.
    Within a source every prompt is drawn once per epoch, in an order that is reshuffled each epoch.
    """

    def __init__(self, prompts: PromptSet, seed: int):
        self._groups = [group for group, weight in zip(prompts.groups, prompts.weights) if weight > 0]
        weights = [Fraction(repr(float(weight))) for weight in prompts.weights if weight > 0]
        self._shares = [weight / sum(weights) for weight in weights]
        self._seed = seed % 2**64
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def batch(self, iteration: int, size: int) -> list[Prompt]:
        """The `size` prompts of `iteration` (counted from 0, all of the same size), with sources
        interleaved."""
        return self.after(iteration * size, size)

    def after(self, position: int, size: int) -> list[Prompt]:
        """The `size` prompts that follow the first `position` of the run, with sources interleaved."""
        drawn = self._drawn_before(position)
        due = self._due(drawn)
        batch = []
        for _ in range(size):
            source = due[0][1]
            batch.append(self._prompt(source, drawn[source]))
            drawn[source] += 1
            heapq.heapreplace(due, (self._due_time(source, drawn[source]), source))
        return batch

    def _due_time(self, source: int, count: int) -> Fraction:
        """When draw number `count` of `source` is due, in draws of the whole mixture."""
        return Fraction(2 * count + 1, 2) / self._shares[source]

    def _due(self, drawn: list[int]) -> list[tuple[Fraction, int]]:
        due = [(self._due_time(source, count), source) for source, count in enumerate(drawn)]
        heapq.heapify(due)
        return due

    def _drawn_before(self, total: int) -> list[int]:
        """How many of the first `total` draws came from each source."""
        # The draws due half a draw per source earlier cannot exceed `total`; a few more draws then reach it.
        time = max(Fraction(0), total - Fraction(len(self._shares), 2))
        drawn = [math.floor(share * time + Fraction(1, 2)) for share in self._shares]
        due = self._due(drawn)
        for _ in range(total - sum(drawn)):
            source = due[0][1]
            drawn[source] += 1
            heapq.heapreplace(due, (self._due_time(source, drawn[source]), source))
        return drawn

    def _prompt(self, source: int, count: int) -> Prompt:
        group = self._groups[source]
        epoch, position = divmod(count, len(group))
        if self._orders.get(source, (None,))[0] != epoch:  # caches the latest epoch; not part of the state
            order = np.random.default_rng([self._seed, source, epoch]).permutation(len(group))
            self._orders[source] = (epoch, order)
        return group[self._orders[source][1][position]]


def _tokenize(prompt: Prompt, tokenizer: Tokenizer, seq_length: int) -> list[int]:
    try:
        token_ids = tokenizer.encode_prompt(prompt.text)
    except ConfigError as error:
        raise ConfigError(f"{prompt.origin}: {error}") from None
    if not token_ids:
        raise ConfigError(f"{prompt.origin}: the prompt is empty")
    if len(token_ids) >= seq_length:
        start = prompt.text if isinstance(prompt.text, str) else prompt.text[0]["content"]
        raise ConfigError(
            f"{prompt.origin}: prompt of {len(token_ids)} tokens leaves no room for a response within "
            f"data.seq_length={seq_length}: {start[:60]!r}"
        )
    return token_ids


def _from_task(source: PromptSource, where: str) -> Iterator[Prompt]:
    for number, entry in enumerate(task_entries(source, where)):
        answer = entry["answer"]
        yield Prompt(
            text=entry["question"],
            token_ids=(),
            domain=source.domain or source.task,
            answer=None if answer is None else str(answer),
            verifier=source.verifier or "reasoning_gym",
            entry=entry,
            origin=f"{where} (task {source.task}), prompt {number}",
        )


def _from_file(source: PromptSource, where: str) -> Iterator[Prompt]:
    empty = True
    try:
        if not stat.S_ISREG(os.stat(source.path).st_mode):  # a pipe: opening it would wait for a writer
            raise ConfigError(f"{where}.path: {source.path} is not a regular file")
        with open(source.path, "rb") as file:
            # Not a loop over the file: that would read a line of gigabytes completely before it could be
            # rejected.
            lines = iter(lambda: file.readline(_LONGEST_LINE + 1), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) > _LONGEST_LINE:
                    limit = f"{_LONGEST_LINE >> 20} MiB"
                    raise ConfigError(f"{source.path}:{number}: a line of more than {limit}; is this JSONL?")
                if line.strip():
                    empty = False
                    yield _from_line(line, source, f"{source.path}:{number}")
    except OSError as error:
        raise ConfigError(f"{where}.path: cannot read {source.path}: {error.strerror}") from None
    if empty:
        raise ConfigError(f"{source.path}: no prompts in this file ({where}.path)")


def _from_line(line: bytes, source: PromptSource, origin: str) -> Prompt:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ConfigError(f"{origin}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{origin}: not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:  # 100,000 brackets
        raise ConfigError(f"{origin}: not readable as JSON: lists or objects nested too deeply") from None
    except ValueError:
        limit = sys.get_int_max_str_digits()
        raise ConfigError(
            f"{origin}: not readable as JSON: a number of more than {limit} digits; write it as text"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: expected an object with `prompt` and `domain`")
    _refuse_what_is_not_passed_on(values, origin)
    for key in values:  # other keys are allowed, except misspellings of ours
        close = None if key in _LINE_KEYS else closest(key, _LINE_KEYS, cutoff=0.8)
        if close is not None and close not in values:
            raise ConfigError(f"{origin}: unknown key {shown(key)}; did you mean {close!r}?")
    domain = source.domain or values.get("domain")
    if domain is None:
        raise ConfigError(f"{origin}: `domain` is missing")
    if not isinstance(domain, str) or not domain.strip():
        raise ConfigError(f"{origin}: `domain` must be a name, found {shown(domain)}")
    answer = values.get("answer")
    if isinstance(answer, float) and not math.isfinite(answer):  # NaN, or 1e400
        raise ConfigError(f"{origin}: `answer` is {answer}, which is not a number; write it as text")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, (str, type(None))):
        raise ConfigError(f"{origin}: `answer` must be text or a number, found {shown(answer)}")
    for key, text in (("domain", domain), ("answer", answer)):
        _require_unicode(text or "", f"`{key}`", origin)
    verifier = values.get("verifier") or source.verifier or "exact_match"
    check_verifier(verifier, origin)
    if verifier == "reasoning_gym":
        raise ConfigError(f"{origin}: verifier `reasoning_gym` only scores prompts of a reasoning-gym `task`")
    return Prompt(_text(values, origin), (), domain, answer, verifier, origin=origin)


def _text(values: dict[str, Any], origin: str) -> str | tuple[dict[str, str], ...]:
    if values.get("prompt") is None:
        raise ConfigError(f"{origin}: `prompt` is missing")
    prompt = values["prompt"]
    if isinstance(prompt, str):
        _require_unicode(prompt, "`prompt`", origin)
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise ConfigError(f"{origin}: `prompt` must be text or a list of messages, found {shown(prompt)}")
    for number, turn in enumerate(prompt):
        _check_message(turn, f"message {number} of `prompt`", origin)
    if prompt[-1]["role"] == "assistant":
        raise ConfigError(
            f"{origin}: the last message of `prompt` is the assistant's, and continuing one is not "
            "supported: end with the user's, or give the prompt as one text"
        )
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in prompt)


def _check_message(turn: Any, what: str, origin: str) -> None:
    if not isinstance(turn, dict):
        raise ConfigError(
            f"{origin}: {what} must be an object with `role` and `content`, found {shown(turn)}"
        )
    _refuse_what_is_not_passed_on(turn, f"{origin}: {what}")
    if isinstance(turn.get("content"), list):
        raise ConfigError(f"{origin}: {what}: `content` in parts is not supported; write it as one text")
    if not all(isinstance(turn.get(key), str) for key in ("role", "content")):
        raise ConfigError(f"{origin}: {what} needs text `role` and `content`")
    if turn["role"] not in _ROLES:
        raise ConfigError(
            f"{origin}: {what}: unknown role {shown(turn['role'])}{nearest(turn['role'], _ROLES)}"
        )
    _require_unicode(turn["content"], f"{what}: `content`", origin)


def _refuse_what_is_not_passed_on(values: dict[str, Any], origin: str) -> None:
    """Reject keys that a chat template would show to the model but that are not passed on; other keys are
    allowed."""
    for key in sorted(_NOT_SUPPORTED & values.keys()):
        if values[key]:
            raise ConfigError(f"{origin}: `{key}` is not supported and would be left out; remove it")


def _require_unicode(text: str, what: str, origin: str) -> None:
    """JSON can contain half a character (`\\ud83d`), which no tokenizer and no file accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{origin}: {what} has half a character at position {error.start} "
            f"(a lone surrogate, \\u{ord(text[error.start]):04x}); was text cut inside an emoji?"
        ) from None
