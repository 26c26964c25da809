"""`${...}` in a configuration: other keys, and environment variables where a path or a name is expected.

Two forms are supported: `${section.key}` (`${.key}`: in the same section) and `${oc.env:NAME}`, with a
default `${oc.env:NAME,DEFAULT}`. OmegaConf's other resolvers are refused: they could transform environment
variables into arbitrary values. Text from the environment is an `EnvironmentText`: the run uses its value,
and everything that writes the configuration (`to_dict`) gets it as the user wrote it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_mopd.config.errors import ConfigError

MAY_NAME_VARIABLES = (
    "run_dir",
    "student.load",
    "teachers[*].load",
    "teacher_storage.mmap_directory",
    "data.tokenizer",
    "data.prompts[*].path",
    "data.eval[*].path",
    "log.wandb_project",
    "log.wandb_name",
)
"""Keys that may use environment variables, besides `include`, which is consumed when a file is read."""
_SECRET = re.compile(
    r"(?:^|_)(?:API_?)?(?:KEYS?|TOKENS?|SECRETS?|PASS(?:WORD|WD|PHRASE)?|CREDENTIALS?|AUTH)\d*(?:_|$)"
)
_OPENING = re.compile(r"(\\*)\$\{")
_VARIABLE = re.compile(r"\s*oc\.env\s*:\s*([A-Za-z_]\w*)\s*(?:,(.*))?", re.DOTALL)
_RESOLVER = re.compile(r"\s*([\w.]+)\s*:")
Path = tuple[str | int, ...]


class EnvironmentText(str):
    """A string that contains an environment variable; `written` is its spelling in the configuration."""

    written: str

    def __new__(cls, value: str, written: str) -> EnvironmentText:
        text = super().__new__(cls, value)
        text.written = written
        return text

    def __getnewargs__(self) -> tuple[str, str]:
        return str(self), self.written

    def __repr__(self) -> str:
        return repr(self.written)  # messages quote values with `!r`


class _Variable(NamedTuple):
    name: str
    default: str | None


class _Reference(NamedTuple):
    key: str


def resolve(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries and lists with every `${...}` replaced.

    Raises `ConfigError` for unknown keys and variables, for resolvers other than `oc.env`, and if a variable
    ends up in a key that is not among `MAY_NAME_VARIABLES`. The error names the key and never quotes the
    value of a variable.
    """
    resolved = _Resolver(tree).value(tree, ())
    for path, _ in _environment_texts(resolved, ()):
        if re.sub(r"\[\d+\]", "[*]", _dotted(path)) not in MAY_NAME_VARIABLES:
            raise ConfigError(
                f"{_dotted(path)}: takes no environment variable; only run_dir, load, mmap_directory, "
                "data.tokenizer, paths of prompts and the names for wandb do"
            )
    return resolved


def resolve_key(tree: dict[str, Any], key: str) -> Any:
    """The value of a single top-level key."""
    return _Resolver(tree).value(tree[key], (key,))


def as_written(value: str) -> str:
    """The spelling of `value` in a configuration: with its variables, and a literal `${` as `\\${`."""
    if isinstance(value, EnvironmentText):
        return value.written
    return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)


def _environment_texts(value: Any, path: Path) -> Iterator[tuple[Path, EnvironmentText]]:
    if isinstance(value, EnvironmentText):
        yield path, value
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _environment_texts(item, (*path, key))


class _Resolver:
    def __init__(self, tree: dict[str, Any]):
        self._tree, self._open = tree, []

    def value(self, node: Any, path: Path) -> Any:
        if isinstance(node, dict):
            return {key: self.value(item, (*path, key)) for key, item in node.items()}
        if isinstance(node, list):
            return [self.value(item, (*path, number)) for number, item in enumerate(node)]
        if type(node) is not str or "${" not in node:
            return node
        if path in self._open:
            raise ConfigError(f"{_dotted(path)}: refers to itself")
        self._open.append(path)
        try:
            return self._joined(_parts(node, path), path)
        finally:
            self._open.pop()

    def _joined(self, parts: list[str | _Variable | _Reference], path: Path) -> Any:
        values = [self._part(part, path) for part in parts]
        if len(values) == 1:
            return values[0]
        if any(isinstance(value, (dict, list)) for value in values):
            raise ConfigError(f"{_dotted(path)}: a section or a list cannot be part of a string")
        text = "".join(map(str, values))
        if any(isinstance(value, EnvironmentText) for value in values):
            return EnvironmentText(text, "".join(as_written(_text(value)) for value in values))
        return text

    def _part(self, part: str | _Variable | _Reference, path: Path) -> Any:
        if isinstance(part, _Reference):
            return self._referred(part.key, path)
        return self._variable(part, path) if isinstance(part, _Variable) else part

    def _variable(self, variable: _Variable, path: Path) -> EnvironmentText | None:
        name, where = variable.name, _dotted(path)
        if _SECRET.search(name.upper()):
            raise ConfigError(
                f"{where}: {name} is the name of a secret, which no key accepts; programs that need it "
                "(wandb) read the environment themselves"
            )
        written, found = f"${{oc.env:{name}}}", os.environ.get(name)
        if variable.default is not None:
            bare = variable.default.strip()
            is_quoted = len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\""
            default = self._joined(_parts(bare[1:-1] if is_quoted else bare, path), path)
            inner = as_written(_text(default))
            written = (
                f"${{oc.env:{name},{bare[0]}{inner}{bare[0]}}}"
                if is_quoted
                else f"${{oc.env:{name},{inner}}}"
            )
            if found is None and bare == "null":
                return None
            found = str(default) if found is None else found
        if found is None:
            raise ConfigError(f"{where}: the environment has no variable {name}")
        return EnvironmentText(found, written)

    def _referred(self, key: str, path: Path) -> Any:
        up = len(key) - len(key.lstrip("."))
        place: Path = path[: max(0, len(path) - up)] if up else ()
        node: Any = self._tree
        for name in place:
            node = node[name]
        for name in re.findall(r"[^.\[\]]+", key):
            if type(node) is str:  # a section that is itself a reference
                node = self.value(node, place)
            if isinstance(node, list) and name.isdigit() and int(name) < len(node):
                name = int(name)
            elif not isinstance(node, dict) or name not in node:
                raise ConfigError(f"{_dotted(path)}: ${{{key}}}: there is no such key in the configuration")
            node, place = node[name], (*place, name)
        return self.value(node, place)


def _text(value: Any) -> str:
    """`value` as a string; an `EnvironmentText` is returned unchanged."""
    return value if isinstance(value, str) else str(value)


def _parts(text: str, path: Path) -> list[str | _Variable | _Reference]:
    """Literal strings, variables and references in order."""
    parts: list[str | _Variable | _Reference] = []
    literal, at = "", 0
    while (found := _OPENING.search(text, at)) is not None:
        slashes = len(found[1])
        literal += text[at : found.start()] + "\\" * (slashes // 2)
        if slashes % 2:
            literal, at = f"{literal}${{", found.end()
            continue
        end = _closing(text, found.end(), path)
        if literal:
            parts.append(literal)
        parts.append(_interpolation(text[found.end() : end], path))
        literal, at = "", end + 1
    literal += text[at:]
    return [*parts, literal] if literal or not parts else parts


def _closing(text: str, start: int, path: Path) -> int:
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if not depth:
            return at
    raise ConfigError(f"{_dotted(path)}: `${{` without a closing `}}`; a literal one is written \\${{")


def _interpolation(inner: str, path: Path) -> _Variable | _Reference:
    if variable := _VARIABLE.fullmatch(inner):
        return _Variable(variable[1], variable[2])
    if resolver := _RESOLVER.match(inner):
        raise ConfigError(
            f"{_dotted(path)}: ${{{resolver[1]}:...}} is not supported; write ${{section.key}} or "
            "${oc.env:NAME} or ${oc.env:NAME,DEFAULT}"
        )
    if not inner.strip() or re.search(r"[:${}]", inner):
        raise ConfigError(f"{_dotted(path)}: an interpolation with a computed name is not supported")
    return _Reference(inner.strip())


def _dotted(path: Path) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
