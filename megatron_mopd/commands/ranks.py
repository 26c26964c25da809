"""Shared code of command-line programs that run alone or under torchrun."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import transformers

from megatron_mopd.backend.agreement import require_agreement
from megatron_mopd.backend.failure import is_first_to_fail
from megatron_mopd.backend.messages import visible
from megatron_mopd.backend.parallel import end_ranks, start_ranks
from megatron_mopd.config import ConfigError
from megatron_mopd.run.rank_facts import command_facts, software_facts


def run_on_ranks(
    work: Callable[[], None],
    device: Callable[[], torch.device] = lambda: torch.device("cpu"),
    reads: Sequence[str] = (),
) -> None:
    """Start torch.distributed for `device` (one rank without torchrun) and run `work` on every rank.

    reads: the model directories on the command line, of which every host may have its own copy. User errors
    and disagreement between ranks print one line and exit with status 2; any other failure ends the job at
    once, so that no rank waits for one that has exited.
    """
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    try:
        lifeline = start_ranks(device(), timeout_minutes=10)
        if dist.get_world_size() > 1:
            require_agreement([*software_facts(), *command_facts(sys.argv[1:], reads)])
        work()
    except ConfigError as error:
        message = f"error: {visible(error)}"
        if is_first_to_fail(message):
            print(message, file=sys.stderr, flush=True)
        os._exit(2)
    except BaseException:
        print(visible(traceback.format_exc(), keep_lines=True), end="", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    end_ranks(lifeline)


def say(text: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(visible(text), flush=True)
