"""Checks that a checkpoint was trained with the run's tokenizer, by comparing what the tokenizers mean."""

from __future__ import annotations

from pathlib import Path

from megatron_mopd.config import ConfigError
from megatron_mopd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mopd.data.tokenizer_meaning import differences, remarks
from megatron_mopd.model.checkpoint import recorded_tokenizer, tokenizer_directory
from megatron_mopd.model.megatron_lm import is_megatron_lm
from megatron_mopd.observe.progress import say

_MOST_SAID = 3


def check_tokenizer(checkpoint: Path, tokenizer: Tokenizer, where: str, *, allow_change: bool) -> None:
    """Raise `ConfigError` (prefix `where`) with the differences if a checkpoint's tokenizer differs from
    `tokenizer`, which is `data.tokenizer`; with `allow_change` print a warning instead.

    Our checkpoints store a fingerprint. If it differs (an earlier release may have written it), the tokenizer
    stored with the weights is compared; for Hugging Face directories this is always done. Megatron-LM's
    checkpoints have no tokenizer. No collectives; all ranks raise the same error, and rank 0 prints the
    warning.
    """
    if is_megatron_lm(checkpoint) or recorded_tokenizer(checkpoint, where) == tokenizer.fingerprint():
        return
    ours = tokenizer.meaning()
    try:
        theirs = load_tokenizer(tokenizer_directory(checkpoint)).meaning()
    except ConfigError as error:
        found = [f"it cannot be compared ({error})"]
    else:
        found = differences(theirs, ours)
        for remark in remarks(theirs, ours):
            say(f"{where}: {remark}")
    if not found:
        return
    more = f"; and {len(found) - _MOST_SAID} more" if len(found) > _MOST_SAID else ""
    said = f"{'; '.join(found[:_MOST_SAID])}{more}"
    problem = f"{where}: {checkpoint} has a different tokenizer from data.tokenizer: {said}"
    if not allow_change:
        raise ConfigError(f"{problem}; use the same one, or continue with --allow-tokenizer-change")
    say(f"warning: {problem} (data.allow_tokenizer_change)")
