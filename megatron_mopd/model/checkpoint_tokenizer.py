"""Whether a checkpoint was trained with the run's tokenizer, judged by what tokenizers mean."""

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
    """`ConfigError` (prefix `where`) that says in what a checkpoint's tokenizer differs from `tokenizer`,
    which is `data.tokenizer`; with `allow_change` it is said and the run goes on.

    One of our checkpoints keeps a fingerprint. Where it is another one, which an earlier release may have
    written, the tokenizer beside the weights is compared, as that of a Hugging Face directory always is.
    Megatron-LM's own checkpoints have none. No collectives; all ranks raise the same, and rank 0 says it.
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
    problem = f"{where}: {checkpoint} has another tokenizer than data.tokenizer: {said}"
    if not allow_change:
        raise ConfigError(f"{problem}; take the same one, or go on with --allow-tokenizer-change")
    say(f"warning: {problem} (data.allow_tokenizer_change)")
