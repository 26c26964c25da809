"""How a failing rank takes the job down: its message is told once, and last."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch.distributed as dist

FIRST_FAILURE = "megatron_mopd/first_failure"
"""Key of the store under which the first failing rank puts its number."""
_LET_THE_FIRST_SPEAK = 1.0
"""Seconds that other ranks wait before they end too: the launcher stops the whole job at the first exit."""


def is_first_to_fail(message: str, store: dist.Store | None = None) -> bool:
    """Whether this rank is the one to say why the job ends; the others' errors are consequences or copies.

    The first rank to ask is. Where ranks are not connected yet, rank 0 is. Under torchrun the message also
    goes into torchrun's closing report, under "Root Cause". Other ranks wait a moment before they get their
    answer, so that the first one's message is out before the launcher ends the job. store: where to ask;
    default, that of torch.distributed. Collectives: none.
    """
    rank = os.environ.get("RANK", "0")
    first = rank == "0"
    if store is not None or dist.is_initialized():
        try:
            store = store or dist.distributed_c10d._get_default_store()
            first = store.compare_set(FIRST_FAILURE, "", rank).decode() == rank
        except (dist.DistError, RuntimeError):
            first = True  # whoever kept the store is gone: better told twice than not at all
    if not first:
        time.sleep(_LET_THE_FIRST_SPEAK)
    elif report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": said}))
    return first
