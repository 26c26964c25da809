"""Find phrases that the prompts of a task share, from examples."""

from __future__ import annotations

import difflib
import random
from collections.abc import Sequence

_PAIRS = 80


def shared_phrases(
    texts: Sequence[str], *, shortest: int = 8, share: float = 0.1, seed: int = 0
) -> list[str]:
    """Substrings of at least `shortest` characters that at least a fraction `share` of `texts` contains,
    longest first.

    Found by matching random pairs of texts; the same texts and seed give the same phrases. A phrase never
    begins or ends inside a word or a number, so what varies between the texts stays outside. Part of a longer
    phrase is omitted unless it often occurs alone. Passed to `train_sentencepiece` as whole pieces, the
    phrases let a small model read a task's fixed instructions as one token each and use its positions for the
    content of the task.
    """
    if len(texts) < 2:
        return []
    draw = random.Random(seed)
    found: set[str] = set()
    for _ in range(_PAIRS):
        left, right = draw.sample(list(texts), 2)
        matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
        for block in matcher.get_matching_blocks():
            found.add(_whole_words(left, block.a, block.a + block.size))
    count = {phrase: sum(phrase in text for text in texts) for phrase in found if len(phrase) >= shortest}
    kept: list[str] = []
    for phrase in sorted(count, key=lambda p: (-len(p), p)):
        covered = any(phrase in longer and count[longer] >= 0.7 * count[phrase] for longer in kept)
        if count[phrase] >= share * len(texts) and not covered:
            kept.append(phrase)
    return kept


def _whole_words(text: str, start: int, end: int) -> str:
    """`text[start:end]` without the letters and digits at either end that belong to a longer word."""
    if start > 0:
        while start < end and text[start].isalnum():
            start += 1
    if end < len(text):
        while end > start and text[end - 1].isalnum():
            end -= 1
    return text[start:end]
