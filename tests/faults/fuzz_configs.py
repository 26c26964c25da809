"""Mutated configurations: each trains one step of a small model, or is rejected with an error naming a key.

    python -m tests.faults.fuzz_configs [--count 10000] [--seed 0] [--train-every 1]
    python -m tests.faults.fuzz_configs --every-key    # each key with each edge-case value, one at a time

Each configuration is a valid one with one to three changes: a value of any type and size, a missing or
misspelt key, or a section that is not a mapping. Each accepted configuration runs in a separate process,
which builds everything and runs one rollout and one optimizer step, with sizes reduced (a model of 10^12
weights is a valid configuration). Anything other than success or a `ConfigError` is a failure, and so are an
error that names no key and a configuration that takes more than `--seconds`. Prints each distinct failure
once, then the tally; exits with status 1 if there were failures.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import io
import json
import os
import random
import re
import select
import signal
import sys
import tempfile
import time
import traceback
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_mopd import train
from megatron_mopd.backend.messages import shown
from megatron_mopd.config import Config, ConfigError, config_from_dict
from megatron_mopd.config.transformer_fields import TRANSFORMER_FIELDS
from megatron_mopd.data.prompts import PromptSampler
from megatron_mopd.run.setup import build_run
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_steps
from tests.faults import harness


def choices_of(hint: Any) -> list[str]:
    """Every name that some key of a section accepts as a choice."""
    is_section = dataclasses.is_dataclass(hint)
    inner = typing.get_type_hints(hint).values() if is_section else typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return list(inner)
    return [choice for part in inner for choice in choices_of(part)]


WORDS = ["self", "default", "add", "copy", "exact_match", *choices_of(Config)]
NUMBERS = [-1, 0, 1, 2, 3, 4, 7, 16, 300, 2**31, 2**62, -0.5, 0.25, 0.999, 1.5, 1e-8, 1e30]
NUMBERS += [float("nan"), float("inf")]
ODD = [None, True, False, "", "x", "é\n", "1e-4", [], [1], ["x"], {}, {"a": 1}, {"x": {"y": 2}}, [{}]]
ODD += ["\ud83d", {"\udc00": "x"}, 10**5000, -(10**400), functools.reduce(lambda x, _: [x], range(200), 1)]


def paths_of(cls: type, prefix: tuple = ()) -> list[tuple]:
    """Every key of the configuration's sections as a path; in a list of sections, the first entry's keys."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        inner = next(iter(typing.get_args(hint)), None) if typing.get_origin(hint) is list else None
        if dataclasses.is_dataclass(hint):
            found += [(*prefix, name), *paths_of(hint, (*prefix, name))]
        elif dataclasses.is_dataclass(inner):
            found += [(*prefix, name), *paths_of(inner, (*prefix, name, 0))]
        elif name != "transformer":
            found.append((*prefix, name))
    return found


PATHS = paths_of(Config)
PATHS += [("student", name) for name in sorted(TRANSFORMER_FIELDS)]
PATHS += [("objective", "per_domain", "add", f.name) for f in dataclasses.fields(Config().objective)]
PATHS += [("routing", "default"), ("routing", "copy", "self"), ("objective", "add", "sft")]
EDGES = [None, True, False, -1, 0, 1, 2, 3, 0.5, 1e30, float("nan"), float("inf"), "", "x", [], [1]]
NAMES = {str(part) for path in PATHS for part in path if part != 0}

ACTIONS = ["set", "set", "set", "set", "drop", "misspell"]


def some_changes(rng: random.Random) -> list[tuple]:
    """One to three mutations: (action, path, value). They depend on the state of `rng` alone (hypothesis also
    draws from the constants of whichever modules happen to be imported).
    """
    return [
        (rng.choice(ACTIONS), rng.choice(PATHS), rng.choice(rng.choice((NUMBERS, WORDS, ODD))))
        for _ in range(rng.randint(1, 3))
    ]


def changed(base: dict, mutations) -> dict:
    """The configuration `base` with the mutations applied; those whose path no longer exists are skipped."""
    result = copy.deepcopy(base)
    for action, path, value in mutations:
        place: Any = result
        with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError):
            for part in path[:-1]:
                place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
            if action == "set":
                place[path[-1]] = copy.deepcopy(value)
            else:
                old = place.pop(path[-1], value)
                if action == "misspell":
                    place[f"{path[-1]}s"] = old
    return result


def cut_down(config: Config, directory: str) -> Config:
    """The same configuration with its own run directory and sizes small enough for sub-second steps."""

    def limited(section, **limits):
        smaller = {name: limit for name, limit in limits.items() if (getattr(section, name) or 0) > limit}
        return dataclasses.replace(section, **smaller)

    model = dict(config.student.transformer)
    for name, value in harness._runs.MODEL.items():
        if isinstance(model.get(name), int) and model[name] > 64:
            model[name] = value
    for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "kv_channels"):
        if isinstance(model.get(name), int):
            model[name] = min(model[name], 64)
    student = limited(config.student, vocab_size=600, make_vocab_size_divisible_by=64)
    schedule = limited(config.schedule, steps_per_rollout=2)
    samples = config.rollout.samples_per_prompt
    if schedule.global_batch_size > 16:
        schedule = dataclasses.replace(schedule, global_batch_size=samples if samples <= 16 else 4)
    return dataclasses.replace(
        config,
        run_dir=directory,
        student=dataclasses.replace(student, transformer=model),
        schedule=schedule,
        rollout=limited(config.rollout, max_new_tokens=6, samples_per_prompt=4, max_batch_size=64),
        rewards=limited(config.rewards, workers=1),
    )


def one_step(config: Config, directory: str) -> None:
    """Build everything that `train` builds, then run one rollout and one optimizer step."""
    run = build_run(cut_down(config, directory))
    sampler = PromptSampler(run.prompts, config.seed)
    trajectories, routing = train.sample(run, sampler, 0)
    batches = plan_steps(run.learner, trajectories, run.rewarder.start(trajectories), routing, 0)
    metrics = train_step(run.learner, batches)
    assert "loss" in metrics


def in_a_process(act: Callable[[], None], seconds: float) -> tuple[str, str]:
    """Run `act` in a fork of this process, and return the outcome and the message.

    Models, process groups and their threads end with the fork, and a crash in native code is just another
    outcome.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "failed", "the process ended without a word"
        try:
            act()
            outcome = "trained", ""
        except ConfigError as error:
            outcome = "refused", str(error)
        except BaseException as error:
            outcome = "failed", _where(error)
        finally:
            os.write(writing, json.dumps(outcome).encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        is_there, _, _ = select.select([pipe], [], [], seconds)
        said = pipe.read() if is_there else b""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if said:
        return tuple(json.loads(said))
    return "failed", f"ended with status {status}" if is_there else "hang"


def _where(error: BaseException) -> str:
    places = [f for f in traceback.extract_tb(error.__traceback__) if "megatron_mopd" in f.filename]
    place = f"{Path(places[-1].filename).name}:{places[-1].lineno}" if places else "?"
    reason = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__} at {place}: {reason[:160]}"


class Fuzzer:
    """Counts the outcomes of configurations, and keeps the first example of each kind of failure."""

    def __init__(self, directory: Path, train_every: int = 1, seconds: int = 120):
        harness.write_inputs(directory)
        self.base = harness.configuration(directory, "run")
        self.base["schedule"] |= {"train_iters": 2, "steps_per_rollout": 1, "global_batch_size": 4}
        self.base["checkpoint"] = {}
        self.directory, self.train_every, self.seconds = directory, train_every, seconds
        self.tally: collections.Counter[str] = collections.Counter()
        self.failures: dict[str, str] = {}

    def check(self, mutations) -> None:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                config = config_from_dict(changed(self.base, mutations))
        except ConfigError as error:
            return self._refused(str(error), mutations)
        except Exception as error:
            return self._fail(_where(error), mutations)
        self.tally["accepted"] += 1
        if self.tally["accepted"] % self.train_every:
            return None

        def act() -> None:
            with contextlib.redirect_stdout(printed):
                one_step(config, str(self.directory / "run"))

        outcome, message = in_a_process(act, self.seconds)
        if outcome == "refused":
            self._refused(message, mutations)
        elif outcome == "failed":
            self._fail(message, mutations)
        else:
            self.tally["trained"] += 1
        return None

    def _refused(self, message: str, mutations) -> None:
        self.tally["refused"] += 1
        if not set(re.findall(r"\w+", message)) & NAMES:
            self._fail(f"names no key: {message}", mutations)

    def _fail(self, kind: str, mutations) -> None:
        self.tally["failed"] += 1
        key = re.sub(r"\d+\.?\d*", "#", kind)
        if key not in self.failures:
            told = [(action, path, shown(value)) for action, path, value in mutations]
            self.failures[key] = f"{kind}\n    {told}"
            print(f"FAILED {self.failures[key]}", file=sys.stderr, flush=True)

    def run(self, count: int, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            self.tally["configurations"] += 1
            self.check(some_changes(rng))

    def run_every_key(self) -> None:
        for path in PATHS:
            for value in EDGES:
                self.tally["configurations"] += 1
                self.check([("set", path, value)])

    def report(self) -> str:
        return ", ".join(f"{self.tally[name]} {name}" for name in _COUNTS)


_COUNTS = ("configurations", "refused", "accepted", "trained", "failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-every", type=int, default=1, help="train every n-th accepted configuration")
    parser.add_argument("--every-key", action="store_true", help="each key with each value at an edge")
    parser.add_argument("--seconds", type=int, default=120, help="time limit for one configuration")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)  # relative run directories end up here
        fuzzer = Fuzzer(Path(temporary), options.train_every, options.seconds)
        if options.every_key:
            fuzzer.run_every_key()
        else:
            fuzzer.run(options.count, options.seed)
    print(f"{fuzzer.report()} in {len(fuzzer.failures)} ways, {time.monotonic() - started:.0f} s")
    sys.exit(1 if fuzzer.failures else 0)


if __name__ == "__main__":
    main()
