"""Damaged input files: each is either read anyway or rejected with a `ConfigError`.

    python -m tests.faults.fuzz_inputs [--count 1000] [--seed 0] [--seconds 60]

The files are prompts (JSONL), tokenizers (SentencePiece, and a Hugging Face directory), a Hugging Face model
(safetensors, configuration) and a checkpoint (its JSON files, checksums, pickles and tensors; half of the
time without the list of checksums, as another program would write it). Each is damaged in one to three
places: bytes are flipped, truncated, inserted or overwritten, or a JSON value is changed, also to values that
JSON allows and few readers expect (lone surrogates, numbers of 5,000 digits, 100,000 brackets). One in three
is instead changed as only an attacker would: a file becomes a link out of the directory, a device or a pipe,
or a sparse file of gigabytes; a value in a safetensors header or a `.metadata` is replaced; file names gain
a directory. One in three of the models is rearranged instead, validly or not (`rearranged_models.py`): fused
experts, sharded or duplicated weights, directories of other kinds; contradictory models must be rejected.
Each input is read in a separate process, so that a crash in native code or a hang counts as a failure too.
Prints each distinct failure once, then the tally; exits with status 1 if there were failures.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from megatron_mopd.config import ConfigError
from megatron_mopd.config.schema import PromptSource
from megatron_mopd.data.prompts import load_prompts
from megatron_mopd.data.tokenizer import load_tokenizer
from megatron_mopd.model.checkpoint import find_checkpoint, read_model_config
from megatron_mopd.model.checksums import CHECKSUM_FILE, verify_checksums
from megatron_mopd.model.convert import open_checkpoint
from megatron_mopd.model.pickled_files import refuse_code
from tests.faults import harness
from tests.faults.rearranged_models import rearrange
from tests.model import _families

READ, REFUSED = 0, 3
_JSON_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null')
ODD_JSON = [
    rb'"\ud83d"',
    rb'"a\udc00b"',
    5000 * b"1",
    100_000 * b"[" + 100_000 * b"]",
    900 * b'{"a":' + b"1" + 900 * b"}",
    b"1e400",
    b"-Infinity",
    b"NaN",
    b'{"role": "usr", "content": "x"}',
    rb'[{"role": "user", "content": "\ud83d"}]',
    b'[{"role": "user", "content": [{"type": "text", "text": "x"}]}]',
]
"""Unusual values that JSON allows or Python accepts as JSON: lone surrogates, huge numbers, deep nesting."""


def read_prompts(directory: Path) -> None:
    tokenizer = load_tokenizer(directory.parent / "sound" / "tokenizer.model")
    load_prompts([PromptSource(path=str(directory / "prompts.jsonl"))], tokenizer, 40)


def read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.decode(tokenizer.encode_prompt("1 + 2 = 3 abc"))
    tokenizer.fingerprint()


def read_model(directory: Path) -> None:
    """Read the description and every weight, in either format."""
    path = find_checkpoint(directory, "student.load")
    read_model_config(path, "student.load")
    verify_checksums(path, "student.load")
    if (path / ".metadata").exists():
        refuse_code(path, "student.load")
    source = open_checkpoint(directory, "student.load")
    for weight in source.weights:
        source.slice_of(weight, (0,) * len(weight.shape), tuple(weight.shape))


def make_inputs(directory: Path) -> dict[str, tuple[Path, Callable[[Path], None]]]:
    """Kind -> an undamaged directory and the function that reads it."""
    sound = directory / "sound"
    sound.mkdir()
    harness.write_inputs(sound)
    _families.make("qwen3-moe", directory / "hugging_face")
    words = {word: number for number, word in enumerate("<unk> </s> a b c 1 2 3 + = copy :".split())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(directory / "hugging_face")
    job = harness.Job(harness.arguments(sound, "run", schedule={"train_iters": 2})).wait()
    assert job.statuses == [0] * harness.RANKS, job.printed
    kinds = {
        "prompts": (directory / "prompts", read_prompts),
        "sentencepiece": (directory / "sentencepiece", lambda d: read_tokenizer(d / "tokenizer.model")),
        "hugging_face": (directory / "hugging_face", read_model),
        "checkpoint": (sound / "run" / "checkpoints", read_model),
    }
    for kind, name in (("prompts", "prompts.jsonl"), ("sentencepiece", "tokenizer.model")):
        kinds[kind][0].mkdir()
        shutil.copy(sound / name, kinds[kind][0] / name)
    (directory / "tokenizer").mkdir()
    for path in (directory / "hugging_face").glob("*token*"):
        shutil.copy(path, directory / "tokenizer" / path.name)
    kinds["hugging_face_tokenizer"] = (directory / "tokenizer", read_tokenizer)
    return kinds


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file; returns a description of the change."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "flip", "cut", "insert", "overwrite", "empty", "json", "spell", "spell"])
    place = rng.randrange(len(data)) if data else 0
    if kind == "json":
        try:
            data = bytearray(json.dumps(_changed(json.loads(data), rng)).encode())
        except (ValueError, RecursionError):
            kind = "flip"
    if kind == "spell":
        values = list(_JSON_VALUE.finditer(data))
        if values:
            value, odd = rng.choice(values), rng.choice(ODD_JSON)
            data[value.start() : value.end()] = odd
            place = value.start()
        else:
            kind = "flip"
    if kind == "flip" and data:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "insert":
        data[place:place] = rng.randbytes(rng.randint(1, 40))
    elif kind == "overwrite":
        end = min(len(data), place + rng.randint(1, 200))
        data[place:end] = rng.choice([bytes(end - place), rng.randbytes(end - place)])
    elif kind == "empty":
        data = bytearray()
    path.write_bytes(bytes(data))
    return f"{kind} at {place} of {path.name}"


def disguise(path: Path, rng: random.Random) -> str:
    """Change a file as an attacker would; returns a description of the change."""
    kind = rng.choice(["link", "sparse", "inside", "inside", "inside"])
    if kind == "link":
        outside = path.parents[1] / "outside"
        outside.write_bytes(path.read_bytes())
        target = rng.choice([outside, "/dev/zero", "/etc/hostname", "/proc/self/environ", "gone", None])
        path.unlink()
        if target is None:
            os.mkfifo(path)
        else:
            path.symlink_to(target)
        return f"{path.name} links to {target}"
    if kind == "sparse":
        with open(path, "r+b") as stream:
            size = rng.choice([2 * 10**8, 8 * 10**9])
            stream.write(struct.pack("<Q", size - 8) if rng.random() < 0.5 else b"")
            stream.truncate(size)
        return f"{path.name} is sparse, {size} bytes"
    data = path.read_bytes()
    with contextlib.suppress(Exception):  # unparsable after earlier damage: nothing left to change
        if path.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", data[:8])
            header = json.dumps(_changed(json.loads(data[8 : 8 + length]), rng)).encode()
            data = struct.pack("<Q", len(header)) + header + data[8 + length :]
        elif path.name == ".metadata":
            data = pickle.dumps(_changed_description(pickle.loads(data), rng))
        else:
            names = [b"model", b"__0_0", b"tokenizer"]
            name, prefix = rng.choice(names), rng.choice([b"../", b"/", b"a/", b"\\u0000", b"../outside/"])
            data = data.replace(name, prefix + name)
    path.write_bytes(data)
    return f"{path.name} changed inside"


def _changed_description(metadata, rng: random.Random):
    """torch's checkpoint metadata with one attribute of one record changed."""
    key = rng.choice(list(metadata.state_dict_metadata))
    records = [metadata, metadata.state_dict_metadata[key], rng.choice(list(metadata.storage_data.values()))]
    record = rng.choice([*records, *getattr(records[1], "chunks", [])])
    names = [*vars(record), "items"]
    other = rng.choice(list(metadata.state_dict_metadata.values()))
    value = rng.choice([None, True, -1, 0, 2**40, "../x", "x", [], {}, torch.Size([2, 2]), torch.Size, other])
    object.__setattr__(record, rng.choice(names), value)
    return metadata


def _changed(value, rng: random.Random):
    """A JSON value with one value inside it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [*value[:place], _changed(value[place], rng), *value[place + 1 :]]
    return rng.choice([None, True, -1, 0, 1, 2**40, 1e30, "", "x", [], {}, [1], {"x": 1}, "../../x", "é"])


def outcome(read: Callable[[Path], None], directory: Path, seconds: float) -> str | None:
    """Read in a separate process. Returns "read", "refused", or what went wrong."""
    report = directory.parent / "report"
    report.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_read, args=(read, directory, report))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return "hang"
    if process.exitcode in (READ, REFUSED):
        return {READ: "read", REFUSED: "refused"}[process.exitcode]
    said = report.read_text() if report.exists() else ""
    return said or f"the process ended with {process.exitcode}"


def _read(read: Callable[[Path], None], directory: Path, report: Path) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    status = 1
    try:
        read(directory)
        status = READ
    except ConfigError:
        status = REFUSED
    except BaseException as error:
        places = [f for f in traceback.extract_tb(error.__traceback__) if "megatron_mopd" in f.filename]
        place = f"{Path(places[-1].filename).name}:{places[-1].lineno}" if places else "?"
        report.write_text(f"{type(error).__name__} at {place}: {str(error)[:200]}")
    finally:
        os._exit(status)


def fuzz(
    directory: Path, count: int, seed: int, seconds: float
) -> tuple[collections.Counter, dict[str, str]]:
    """Read `count` damaged inputs. Returns outcome counts by kind, and the first example of each failure."""
    kinds, rng = make_inputs(directory), random.Random(seed)
    tally, failures = collections.Counter(), {}
    for kind, (sound, read) in kinds.items():
        assert outcome(read, sound, 10 * seconds) == "read", f"{kind}: the undamaged input is not read"
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        sound, read = kinds[kind]
        target = directory / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(sound, target)
        if kind == "checkpoint" and rng.random() < 0.5:
            next(target.glob(f"iter_*/{CHECKSUM_FILE}")).unlink()
        files = sorted(path for path in target.rglob("*") if path.is_file())
        must_refuse = False
        if kind == "hugging_face" and rng.random() < 1 / 3:
            how, must_refuse = rearrange(target, rng)
            done = [how]
        elif kind == "checkpoint" and rng.random() < 1 / 10:  # as another program would write it
            next(target.glob("iter_*/model.json")).unlink()
            done, must_refuse = ["model.json removed"], True
        elif rng.random() < 1 / 3:
            done = [disguise(rng.choice(files), rng)]
        else:
            done = [damage(rng.choice(files), rng) for _ in range(rng.randint(1, 3))]
        result = outcome(read, target, seconds)
        if must_refuse and result == "read":
            result = "it is read, though it contradicts itself or is no model"
        tally[kind, result if result in ("read", "refused") else "failed"] += 1
        if result not in ("read", "refused") and f"{kind}: {result}" not in failures:
            failures[f"{kind}: {result}"] = ", ".join(done)
            print(f"FAILED {kind}: {result}\n    {', '.join(done)}", file=sys.stderr, flush=True)
    return tally, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit for one input")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        tally, failures = fuzz(Path(temporary), options.count, options.seed, options.seconds)
    for kind in sorted({kind for kind, _ in tally}):
        counts = ", ".join(f"{tally[kind, name]} {name}" for name in ("read", "refused", "failed"))
        print(f"{kind}: {counts}")
    failed = sum(number for (_, name), number in tally.items() if name == "failed")
    print(
        f"{options.count} damaged inputs, {failed} failed in {len(failures)} ways, "
        f"{time.monotonic() - started:.0f} s"
    )
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
