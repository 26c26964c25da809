"""Facts that must be equal on every rank of a run, which `backend.agreement` compares."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import megatron_mopd
from megatron_mopd.backend.agreement import Fact
from megatron_mopd.backend.software import installed_version
from megatron_mopd.config import Config, ConfigError, ModelConfig, to_dict
from megatron_mopd.config.interpolation import EnvironmentText
from megatron_mopd.config.resume import leaves
from megatron_mopd.data.prompts import PromptSet
from megatron_mopd.model.checkpoint import complete_iterations, find_checkpoint
from megatron_mopd.run.resumable import checkpoints_directory
from megatron_mopd.teachers.fingerprint import quick_fingerprint

_PACKAGES = ("torch", "megatron-core", "transformers")
_SAME_SOFTWARE = "install the same release on every host"
_SAME_SETTINGS = "start every rank with the same configuration"
_SAME_FILES = "give every host the same files"
_ONE_DIRECTORY = "run_dir must be on a file system that all hosts share"

# Paths whose content is compared instead, because each host may have its own copy at its own path.
_BY_CONTENT = (".load", ".path", "data.tokenizer")
_HOSTS_OWN = ("device", "teacher_storage.mmap_directory", "log.wandb_project", "log.wandb_name")
"""May differ: device names (`start_ranks` compares the kind of device), each host's local disk, and what only
rank 0 uses."""


def launch_facts(config: Config) -> list[Fact]:
    """Software and settings. No collectives; reads no files other than this package's source."""
    return software_facts() + list(_settings(config))


def software_facts() -> list[Fact]:
    """Versions of Python and of the packages that results depend on. No collectives."""
    facts = [Fact(name, *2 * (str(installed_version((name,))),), _SAME_SOFTWARE) for name in _PACKAGES]
    source = _source_digest()
    release = f"{megatron_mopd.__version__} (source {source[:8]})"
    facts.append(Fact("megatron_mopd", source, release, _SAME_SOFTWARE))
    python = ".".join(platform.python_version_tuple()[:2])
    facts.append(Fact("python", python, python, _SAME_SOFTWARE))
    return facts


def _settings(config: Config) -> Iterator[Fact]:
    for key, value in leaves(config):
        if key in _HOSTS_OWN:
            continue
        written = value.written if isinstance(value, EnvironmentText) else _text(value)
        if key.endswith(_BY_CONTENT):
            compared = "null" if value is None else "a path"
        elif key == "run_dir":
            compared = os.path.abspath(value)
            written = written if isinstance(value, EnvironmentText) else compared
        else:
            compared = _text(value)
        yield Fact(key, hashlib.sha256(compared.encode()).hexdigest(), written, _SAME_SETTINGS)


def input_facts(
    config: Config,
    tokenizer: str,
    student: ModelConfig,
    teachers: dict[str, ModelConfig],
    prompts: PromptSet,
    eval_prompts: PromptSet | None,
) -> list[Fact]:
    """Files: tokenizer (its fingerprint), models, prompts, and the checkpoints in the run directory.

    student, teachers: resolved, with the paths they are loaded from. Raises `ConfigError` for a checkpoint
    that cannot be read. No collectives.
    """
    facts = [_file("the tokenizer of data.tokenizer", config.data.tokenizer, tokenizer)]
    models = {"student": student} | {f"teachers.{name}": model for name, model in teachers.items()}
    for where, model in models.items():
        architecture = {key: value for key, value in to_dict(model).items() if key != "load"}
        described = _text(architecture) + _weights(model.load, f"{where}.load")
        facts.append(
            _file(f"the model of {where}.load", model.load, hashlib.sha256(described.encode()).hexdigest())
        )
    for key, sources, read in (
        ("data.prompts", config.data.prompts, prompts),
        ("data.eval", config.data.eval, eval_prompts),
    ):
        prints = read.source_fingerprints() if read is not None else []
        for number, (source, fingerprint) in enumerate(zip(sources, prints)):
            facts.append(_file(f"the prompts of {key}[{number}]", source.path or source.task, fingerprint))
    found = sorted(complete_iterations(checkpoints_directory(config.run_dir)))
    shown = f"checkpoints {', '.join(map(str, found))}" if found else "no checkpoints"
    facts.append(Fact("the checkpoints in run_dir", str(found), shown, _ONE_DIRECTORY))
    return facts


def command_facts(arguments: Sequence[str], reads: Sequence[str]) -> list[Fact]:
    """Facts of a command line: its arguments, and the model directories among them that it `reads`. An
    unreadable directory is a fact too; if it is unreadable on every rank, the command itself reports it. No
    collectives.
    """
    other = [argument for argument in arguments if argument not in reads]
    facts = [Fact("the command line", _text(other), " ".join(other), "start every rank with the same one")]
    for number, path in enumerate(reads, start=1):
        try:
            fingerprint = quick_fingerprint(find_checkpoint(path, ""))
        except (ConfigError, OSError):
            fingerprint = "not readable"
        facts.append(_file(f"model directory {number} of the command line", path, fingerprint))
    return facts


def _weights(load: str | None, where: str) -> str:
    if load is None:
        return ""
    try:
        return quick_fingerprint(find_checkpoint(load, where))
    except OSError as error:
        raise ConfigError(f"{where}: cannot read {error.filename}: {error.strerror}") from None


def _file(name: str, path: str | None, digest: str) -> Fact:
    written = path.written if isinstance(path, EnvironmentText) else path
    return Fact(name, digest, f"{written} (SHA-256 {digest[:8]})", _SAME_FILES)


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


@cache
def _source_digest() -> str:
    """SHA-256 of this package's Python files: checkouts of one version may differ."""
    digest, directory = hashlib.sha256(), Path(megatron_mopd.__file__).parent
    for path in sorted(directory.rglob("*.py")):
        digest.update(f"{path.relative_to(directory)} ".encode() + path.read_bytes())
    return digest.hexdigest()
