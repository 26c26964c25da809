"""The meaning of a tokenizer independent of its file format, its fingerprint, and the differences between
two.

The same tokenizer is stored differently by every release of `transformers` (order of keys, fields with
default values, merges as strings or pairs), as `tokenizer.model` or as the `tokenizer.json` converted from
it, with its chat template inside `tokenizer_config.json` or next to it. So behaviour is compared, not files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from megatron_mopd.backend.messages import visible
from megatron_mopd.data.chat_template import differing_line, template_meaning

_ANCHOR = "a"
"""Precedes every probe, and its tokens are dropped: whether a space is put before a text's first word depends
on the library that reads a SentencePiece model, and only `data.tokenizer` ever encodes."""
_PROBES = (
    "Find the GCD of 1071 and 462, then give only the answer: 21.",
    "It's what they'd've said; WE'LL see. HTTPServer getUserName snake_case_name kebab-case",
    "two  spaces   three\ttab\n\nparagraph\r\n  indented\n\t\tcode() {return x+=1;} // why?",
    "0 7 42 365 2048 31415 271828 1000000 3.14159 -2.5e-10 1,234,567 12:30 2026-11-27 50% $9.99",
    "café cafe\u0301 naïve Straße İstanbul \ufb01ne \uff21\uff22\uff23 ½ x² “quoted” — …",
    "漢字とかな 한국어 Русский العربية עברית हिन्दी ไทย",
    "\U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea → ∑∫√ \u00a0nbsp",
    "\\frac{a}{b} \\boxed{42} $x_1^2$ def f(x): return [y for y in x if y != 0] <b>bold</b> &amp; #tag @me",
)
_MOST_TOKENS = 20_000
"""From a larger vocabulary, this many evenly spaced tokens are encoded again."""
_TOKENS_OF_A_TEXT = 500
_BEGINNING_OF_WORD = str.maketrans({"\u2581": " ", "\u0120": " ", "\u010a": "\n", "\u0109": "\t"})
"""How SentencePiece and byte-level vocabularies write a space, and the latter a newline and a tab."""


@dataclass(frozen=True)
class TokenizerMeaning:
    """Everything about a tokenizer that token ids, prompts and responses depend on."""

    tokens: Mapping[int, str]
    """Id -> token as the vocabulary writes it."""
    special: frozenset[int]
    """Ids that decoding skips, except the token for unknown characters, in which libraries differ."""
    eos_id: int
    bos_id: int | None
    """Put before a plain-text prompt; `None` also if the files do not specify it."""
    says_bos: bool
    """Whether the files specify `bos_id`: a SentencePiece model alone does not, it only has a token for
    it."""
    chat_template: str | None
    encoded: Mapping[str, tuple[int, ...]]
    """Probe -> its ids: how text is tokenized."""

    def fingerprint(self) -> str:
        """SHA-256 of the meaning: equal for the same tokenizer, wherever and however it is stored.

        It does not depend on file formats, the release that wrote the files, padding and truncation, or what
        Jinja ignores in a chat template (comments, whitespace inside tags, the final newline).
        """
        content = {
            "tokens": sorted(self.tokens.items()),
            "special": sorted(self.special),
            "eos_id": self.eos_id,
            "bos_id": self.bos_id,
            "chat_template": template_meaning(self.chat_template),
            "encoded": sorted(self.encoded.items()),
        }
        return hashlib.sha256(json.dumps(content).encode(errors="surrogatepass")).hexdigest()

    def token(self, token_id: int | None) -> str:
        """A token formatted for a message: `2 '<|im_end|>'`."""
        if token_id is None:
            return "none"
        return f"{token_id} {_quoted(self.tokens[token_id])}" if token_id in self.tokens else f"{token_id}"

    def quoted(self, token_ids: Iterable[int]) -> str:
        """Tokens formatted for a message: `'he' 'llo'`."""
        return " ".join(_quoted(self.tokens.get(number, "")) for number in token_ids) or "nothing"


def probe(
    tokens: Mapping[int, str], special: frozenset[int], encode: Callable[[str], list[int]]
) -> dict[str, tuple[int, ...]]:
    """`TokenizerMeaning.encoded`: ids of fixed texts, and of texts made of the vocabulary's own tokens."""
    prefix = len(encode(_ANCHOR))
    texts = itertools.chain(_PROBES, _texts_of_vocabulary(tokens, special))
    return {text: tuple(encode(f"{_ANCHOR} {text}")[prefix:]) for text in texts}


def _texts_of_vocabulary(tokens: Mapping[int, str], special: frozenset[int]) -> Iterator[str]:
    """Every token by itself, and each followed by another one, so that a different order of merges shows."""
    ordinary = [
        token.translate(_BEGINNING_OF_WORD)
        for number, token in sorted(tokens.items())
        if number not in special and not (token.startswith("<") and token.endswith(">"))
    ]
    chosen = ordinary[:: -(-len(ordinary) // _MOST_TOKENS) or 1]
    pairs = [first + chosen[(7919 * number + 1) % len(chosen)] for number, first in enumerate(chosen)]
    for start in range(0, len(chosen), _TOKENS_OF_A_TEXT):
        for words in (chosen, pairs):
            yield " ".join(words[start : start + _TOKENS_OF_A_TEXT])


def differences(theirs: TokenizerMeaning, ours: TokenizerMeaning) -> list[str]:
    """The differences between a tokenizer and `data.tokenizer` (`ours`), one phrase each; empty if there are
    none.

    Phrases have at most about 120 characters, and contain no terminal control characters.
    """
    found = []
    differing = [
        number
        for number in sorted(theirs.tokens.keys() | ours.tokens.keys())
        if theirs.tokens.get(number) != ours.tokens.get(number)
    ]
    if differing:
        first, more = differing[0], len(differing) - 1
        there, here = (_token_or_none(meaning.tokens.get(first)) for meaning in (theirs, ours))
        others = f" (and {more} more ids differ)" if more else ""
        contrast = f"not {here}" if first in ours.tokens else "and no token here"
        found.append(f"id {first} is {there}, {contrast}{others}")
    if changed := sorted(n for n in theirs.special ^ ours.special if n in theirs.tokens and n in ours.tokens):
        verb = "is" if changed[0] in theirs.special else "is not"
        found.append(f"token {theirs.token(changed[0])} {verb} a special token")
    if theirs.eos_id != ours.eos_id:
        there, here = theirs.token(theirs.eos_id), ours.token(ours.eos_id)
        found.append(f"its end-of-sequence token is {there}, not {here}")
    if theirs.bos_id != ours.bos_id and theirs.says_bos and ours.says_bos:
        there, here = theirs.token(theirs.bos_id), ours.token(ours.bos_id)
        found.append(f"the token before a plain prompt is {there}, not {here}")
    if not differing and (text := _first_cut(theirs, ours)) is not None:
        found.append(text)
    if template_meaning(theirs.chat_template) != template_meaning(ours.chat_template):
        found.append(differing_line(theirs.chat_template, ours.chat_template))
    return found


def remarks(theirs: TokenizerMeaning, ours: TokenizerMeaning) -> list[str]:
    """Notable differences in the files that do not change the meaning."""
    templates = (theirs.chat_template, ours.chat_template)
    if None in templates or templates[0] == templates[1] or differences(theirs, ours):
        return []
    return [f"{differing_line(*templates)}, which renders the same"]


def _first_cut(theirs: TokenizerMeaning, ours: TokenizerMeaning) -> str | None:
    for text, here in ours.encoded.items():
        there = theirs.encoded.get(text, here)  # texts differ only if the vocabularies do
        if there != here:
            place = next(i for i, (t, o) in enumerate(itertools.zip_longest(there, here)) if t != o)
            parts = [theirs.quoted(there[place : place + 2]), ours.quoted(here[place : place + 2])]
            return f"text is tokenized differently: {parts[0]}, not {parts[1]}"
    return None


def _token_or_none(token: str | None) -> str:
    return "no token" if token is None else _quoted(token)


def _quoted(token: str) -> str:
    return visible(repr(token if len(token) <= 24 else token[:24] + "..."))
