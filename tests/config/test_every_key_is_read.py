"""Every configuration key is read outside the configuration's own definition.

The test searches the package's source for reads of the key as an attribute of its section, as in
`config.optimizer.lr`, or of a variable that holds the section. A key that nothing reads has no effect.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from pathlib import Path

import megatron_mopd
from megatron_mopd.config import Config, schema

PACKAGE = Path(megatron_mopd.__file__).parent

# The names under which a section's keys are read: the section's own, and those of variables that hold it.
ALIASES = {
    "Config": {"config"},
    "ModelConfig": {"student", "model", "loaded", "architecture"},
    "TeacherConfig": {"teacher"},
    "TeacherStorageConfig": {"teacher_storage", "storage"},
    "ParallelConfig": {"parallel"},
    "PromptSource": {"source"},
    "DataConfig": {"data"},
    "RolloutConfig": {"rollout"},
    "ObjectiveConfig": {"objective", "o", "default", "base"},
    "RewardsConfig": {"rewards"},
    "OptimizerConfig": {"optimizer", "settings"},
    "ScheduleConfig": {"schedule"},
    "EvaluationConfig": {"evaluation", "settings"},
    "CheckpointConfig": {"checkpoint", "settings"},
    "GuardConfig": {"guard"},
    "LogConfig": {"log"},
}


def sections(cls=Config) -> set[type]:
    """Every dataclass of the configuration."""
    found = {cls}
    for hint in typing.get_type_hints(cls).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                found |= sections(inner)
    return found


def reads(source: str) -> set[tuple[str, str]]:
    """(name before the dot, attribute) of every attribute that is read."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if isinstance(owner, ast.Attribute):
                found.add((owner.attr.lstrip("_"), node.attr))
            elif isinstance(owner, ast.Name):
                found.add((owner.id, node.attr))
    return found


def unread(cls: type, found: set[tuple[str, str]]) -> list[str]:
    aliases = ALIASES[cls.__name__]
    return [f.name for f in dataclasses.fields(cls) if not any((alias, f.name) in found for alias in aliases)]


def all_reads() -> set[tuple[str, str]]:
    # The schema defines keys, and the loader's range checks do not count as uses.
    files = [p for p in PACKAGE.rglob("*.py") if p.name not in ("schema.py", "loading.py")]
    return set().union(*(reads(path.read_text()) for path in files))


def test_every_section_is_walked():
    assert {cls.__name__ for cls in sections()} == set(ALIASES)
    assert {name for name, value in vars(schema).items() if dataclasses.is_dataclass(value)} == set(ALIASES)


EXCEPTIONS = {
    # Resolved on the nested dictionaries, before the dataclasses are created (`recipes.with_recipe`).
    "Config": {"recipe"},
}


def test_every_key_is_read():
    found = all_reads()
    for cls in sections():
        assert set(unread(cls, found)) <= EXCEPTIONS.get(cls.__name__, set()), cls.__name__


def test_a_key_that_nothing_reads_would_be_found():
    @dataclasses.dataclass
    class RolloutConfig:
        temperature: float = 1.0
        promised: int = 0

    source = "def f(config):\n    config.rollout.promised = 1\n    return config.rollout.temperature\n"
    assert unread(RolloutConfig, reads(source)) == ["promised"]
