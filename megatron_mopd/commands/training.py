"""The command line of a run: its options, and the message and exit status of each way it can end."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_mopd.backend.failure import is_first_to_fail
from megatron_mopd.backend.lifeline import LIFELINE_NOTICES
from megatron_mopd.backend.messages import visible
from megatron_mopd.backend.whole_files import disk_problem
from megatron_mopd.config import Config, ConfigError, load_config
from megatron_mopd.model.background_save import SaveError
from megatron_mopd.observe.progress import say
from megatron_mopd.run.preemption import INTERRUPTED_STATUS, PREEMPTED_STATUS, Preempted

_MAKE_ROOM = "make room, and the same command continues from the last checkpoint"


def run_command(train: Callable[[Config], Any], description: str, arguments: Sequence[str] | None) -> None:
    """Read the configuration and call `train`; ends the process unless training succeeds.

    A user error prints one line and exits with status 2. A run that was asked to stop and has saved exits
    with status 75 on every rank.
    """
    parser = argparse.ArgumentParser(prog="megatron_mopd.train", description=description)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--debug", action="store_true", help="show stack traces of configuration errors")
    parser.add_argument(
        "--allow-teacher-change",
        action="store_true",
        help="resume even if the teachers differ from those the checkpoint was written with",
    )
    parser.add_argument(
        "--allow-tokenizer-change",
        action="store_true",
        help="continue even if a model was trained with a tokenizer or chat template unlike data.tokenizer",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    if options.allow_teacher_change:
        options.overrides.append("checkpoint.allow_teacher_change=true")
    threading.excepthook = _of_thread
    if options.allow_tokenizer_change:
        options.overrides.append("data.allow_tokenizer_change=true")
    try:
        train(load_config(options.config, options.overrides))
    except Preempted as request:
        say(f"{request} (exit status {PREEMPTED_STATUS})")
        dist.barrier()  # the launcher stops all ranks when the first one exits
        _leave(PREEMPTED_STATUS)
    except KeyboardInterrupt:  # before the first step, when there is nothing to save
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        _leave(INTERRUPTED_STATUS)
    except Exception as error:
        # One rank's failure ends the job: the others wait in a collective until the launcher stops them.
        if isinstance(error, RuntimeError):
            # A collective fails when a rank dies. Give the lifeline time to notice and report which one.
            time.sleep(LIFELINE_NOTICES)
        # A full disk is not a bug in the program, so it gets one line, like a user error.
        full = disk_problem(error)
        is_mistake = isinstance(error, ConfigError)
        # The error may quote files, names and models: escape control characters so that none acts on the
        # terminal.
        is_line = is_mistake or full is not None or isinstance(error, SaveError)
        said = visible(error if full is None else f"{full}; {_MAKE_ROOM}", keep_lines=not is_line)
        message = f"error: {said}" if is_line else f"{type(error).__name__}: {said}"
        if is_first_to_fail(message):
            if options.debug or not is_line:
                print(visible(traceback.format_exc(), keep_lines=True), end="", file=sys.stderr)
            print(message, file=sys.stderr)
        _leave(2 if is_mistake else 1)
    if dist.is_initialized():
        dist.destroy_process_group()


def _of_thread(failure: threading.ExceptHookArgs) -> None:
    """Suppress a library thread's full-disk error (TensorBoard's): its caller reports it in one line."""
    if disk_problem(failure.exc_value) is None:
        threading.__excepthook__(failure)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
