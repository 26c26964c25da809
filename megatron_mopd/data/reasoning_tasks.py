"""Prompts made by reasoning-gym tasks: the same on every rank, in every process, for the same seed."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from megatron_mopd.config import ConfigError, PromptSource, nearest

# These iterate over sets of strings, whose order Python randomises per process: two ranks would see
# different prompts for one seed, and so would a resumed run. They are made in a process whose hashing is
# fixed. (The list is what differs between two hash seeds among the 106 tasks of reasoning-gym 0.1.25;
# comparing `PromptSet.fingerprint` over ranks finds any that a later release adds.)
HASH_DEPENDENT = frozenset(
    ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
)
# reasoning-gym makes prompt i of seed s from the number s + i, so that seeds 0 and 1 share all but one
# prompt. Ours are this far apart. Some tasks seed numpy, which takes 32 bits.
_SEED_DISTANCE = 2**20
_MAX_SEED = 2**32 // _SEED_DISTANCE - 1
_MAKE_ENTRIES = """
import pickle, sys
output, sys.stdout = sys.stdout.buffer, sys.stderr
import reasoning_gym
task, arguments = pickle.load(sys.stdin.buffer)
dataset = reasoning_gym.create_dataset(task, **arguments)
pickle.dump([dataset[i] for i in range(len(dataset))], output)
"""


def task_entries(source: PromptSource, where: str) -> list[dict[str, Any]]:
    """The `source.size` entries of a reasoning-gym task: `question`, `answer`, `metadata`, and our `params`.

    Different seeds share no entry by construction; a task with few possible questions may still repeat some.

    Raises `ConfigError` (`where` names the source) for an unknown task, an unknown parameter, or values
    that the task itself refuses.
    """
    task = source.task
    if task not in DATASETS:
        raise ConfigError(f"{where}.task: unknown reasoning-gym task {task!r}{nearest(str(task), DATASETS)}")
    if task == "composite":
        raise ConfigError(f"{where}.task: list the tasks of 'composite' as sources of their own")
    known = {field.name for field in dataclasses.fields(DATASETS[task][1])} - {"seed", "size"}
    for name in source.params:
        if name in ("seed", "size"):
            raise ConfigError(f"{where}.params.{name}: set {where}.{name} instead")
        if name not in known:
            raise ConfigError(f"{where}.params: task {task!r} has no {name!r}{nearest(name, known)}")
    if not 1 <= source.size <= _SEED_DISTANCE:
        raise ConfigError(f"{where}.size: must be from 1 to {_SEED_DISTANCE}, found {source.size}")
    if not 0 <= source.seed < _MAX_SEED:
        raise ConfigError(f"{where}.seed: must be from 0 to {_MAX_SEED - 1}, found {source.seed}")
    arguments = {**source.params, "seed": source.seed * _SEED_DISTANCE, "size": source.size}
    try:
        if task in HASH_DEPENDENT and sys.flags.hash_randomization:
            entries = _entries_with_fixed_hashing(task, arguments)
        else:
            dataset = reasoning_gym.create_dataset(task, **arguments)
            entries = [dataset[i] for i in range(len(dataset))]
    except Exception as error:  # tasks check their parameters with assert, and with anything else
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{where}: reasoning-gym task {task!r}: {reason}") from None
    return [{**entry, "params": dict(source.params)} for entry in entries]


def _entries_with_fixed_hashing(task: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    result = subprocess.run(
        [sys.executable, "-c", _MAKE_ENTRIES],
        input=pickle.dumps((task, arguments)),
        capture_output=True,
        env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit status {result.returncode}")
    return pickle.loads(result.stdout)
