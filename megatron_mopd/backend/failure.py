"""How a failing rank ends the job: its error message is printed once, and last."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch.distributed as dist

FIRST_FAILURE = "megatron_mopd/first_failure"
"""Store key under which the first failing rank records its number."""
_LET_THE_FIRST_SPEAK = 1.0
"""Seconds that other ranks wait before they exit too: the launcher stops the whole job at the first exit."""


def is_first_to_fail(message: str, store: dist.Store | None = None) -> bool:
    """Whether this rank should report why the job ends; the other ranks' errors are consequences or copies.

    True on the first rank to call this, or on rank 0 if the ranks are not connected yet. Under torchrun the
    message also appears in torchrun's final report, under "Root Cause". On other ranks the call returns after
    a delay, so that the first rank's message is printed before the launcher ends the job. store: defaults to
    that of torch.distributed. Collectives: none.
    """
    rank = os.environ.get("RANK", "0")
    first = rank == "0"
    if store is not None or dist.is_initialized():
        try:
            store = store or dist.distributed_c10d._get_default_store()
            first = store.compare_set(FIRST_FAILURE, "", rank).decode() == rank
        except (dist.DistError, RuntimeError):
            first = True  # the store's owner has exited: better two reports than none
    if not first:
        time.sleep(_LET_THE_FIRST_SPEAK)
    elif report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": said}))
    return first
