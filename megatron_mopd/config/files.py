"""Reads YAML configuration files and the files they include.

A file may be named by mistake (`include: ~/.netrc`) or not be a configuration at all: messages give the
position of an error and never quote the file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError
from yaml.reader import ReaderError

from megatron_mopd.config.errors import ConfigError
from megatron_mopd.config.interpolation import resolve_key
from megatron_mopd.config.schema import Config

_SECTIONS = {item.name for item in dataclasses.fields(Config)} | {"include"}


def read_tree(path: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Nested dictionaries, merged in this order: included files, the file, `a.b=c` overrides.

    `${...}` is left unresolved. Raises `ConfigError` naming the file and the position in it.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
    raw = _read(path) if path is not None else OmegaConf.create({})
    for override in overrides:
        key = override.partition("=")[0]
        try:
            raw = OmegaConf.merge(raw, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: override {key}: {_problem(error)}") from None
    try:
        raw = _with_included(raw, path.parent if path is not None else Path())
        return OmegaConf.to_container(raw, resolve=False)
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{path}: {_problem(error)}") from None


def _read(path: Path) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_keys(node, path)
        is_section = node is None or isinstance(node, yaml.MappingNode)
        raw = OmegaConf.create(text) if is_section else None
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"config file not found: {path}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_problem(error)}") from None
    if not isinstance(raw, DictConfig):
        raise ConfigError(f"{path}: not a configuration: expected sections with keys")
    if raw and not _SECTIONS & set(raw):
        raise ConfigError(
            f"{path}: not a configuration: none of its keys is a section; known: "
            f"{', '.join(sorted(_SECTIONS))}"
        )
    return raw


def _check_keys(node: yaml.Node | None, path: Path) -> None:
    """Refuse keys that YAML does not read as strings: `no`, `on`, `null`, `1e3`, `1.10`.

    As a domain's name, such a key would silently become a different name. Integers are valid names (`1:`)
    unless YAML normalizes their spelling (`0x10`, `1_000`).
    """
    if not isinstance(node, yaml.MappingNode) or not _SECTIONS & {str(key.value) for key, _ in node.value}:
        return  # not a configuration, so do not quote its contents
    open_nodes, seen = [node], set()
    while open_nodes:
        current = open_nodes.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, yaml.SequenceNode):
            open_nodes += current.value
        for key, value in current.value if isinstance(current, yaml.MappingNode) else ():
            open_nodes.append(value)
            _check_key(key, f"{path}: line {key.start_mark.line + 1}, column {key.start_mark.column + 1}")


def _check_key(key: yaml.Node, where: str) -> None:
    if not isinstance(key, yaml.ScalarNode):
        raise ConfigError(f"{where}: the key is a list or a section; keys must be names")
    if key.style is not None or key.value == "<<":
        return
    # Parse with OmegaConf, whose rules differ slightly from YAML's.
    (read,) = OmegaConf.to_container(OmegaConf.create(f"- {key.value}"), resolve=False)
    if isinstance(read, str) or str(read) == key.value and type(read) is int:
        return
    meaning = "null" if read is None else str(read).lower() if isinstance(read, bool) else "a number"
    raise ConfigError(
        f'{where}: YAML reads the key {key.value or "(nothing)"} as {meaning}; quote it: "{key.value}"'
    )


def _with_included(raw: DictConfig, directory: Path) -> DictConfig:
    """`include: FILE` (relative to the including file) merges this file over that one."""
    seen: set[Path] = set()
    while OmegaConf.to_container(raw, resolve=False).get("include") is not None:
        name = resolve_key(OmegaConf.to_container(raw, resolve=False), "include")
        del raw["include"]
        if not isinstance(name, str):
            raise ConfigError("include: expected the name of one file")
        path = (directory / name).resolve()
        if path in seen:
            raise ConfigError(f"include: {path} includes itself")
        seen.add(path)
        raw, directory = OmegaConf.merge(_read(path), raw), path.parent
    return raw


def _problem(error: Exception) -> str:
    """The error and its position without the parsers' quotations of lines, keys and characters."""
    if isinstance(error, ReaderError):
        return f"an invalid character at position {error.position}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text at byte {error.start}"
    if isinstance(error, yaml.MarkedYAMLError):
        # Quotations are the file's own text, except for the parser's token names, `'<block end>'`.
        text = re.sub(r"'(?!<[a-z ]+>')[^']*'|\"[^\"]*\"", "...", error.problem or "")
        text = re.sub(r"(duplicate key) .*", r"\1", " ".join(text.split()))
        mark = error.problem_mark or error.context_mark
        return f"{text} at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else text
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if type(error) is ValueError and "digits" in str(error):
        return "a number of thousands of digits"
    return f"{type(error).__name__}{f' at {key}' if (key := getattr(error, 'full_key', None)) else ''}"
