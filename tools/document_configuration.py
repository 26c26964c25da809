"""Write docs/configuration.md from the docstrings of the configuration's dataclasses.

python tools/document_configuration.py            # writes the file
python tools/document_configuration.py --check    # status 1 when the file is not what would be written
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import textwrap
import typing
from pathlib import Path

from megatron_mopd.config import schema
from megatron_mopd.config.documentation import field_documentation
from megatron_mopd.config.interpolation import MAY_NAME_VARIABLES
from megatron_mopd.config.resume import split_documentation
from megatron_mopd.config.value_types import type_name

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

_HEAD = """# Configuration

Written by `python tools/document_configuration.py` from `megatron_mopd/config/schema.py`,
`model_schema.py` and `objective_schema.py`: edit those.

A run is one YAML file, `python -m megatron_mopd.train --config FILE.yaml`, and any key can be overridden on
the command line as `section.key=value`. `include: OTHER.yaml` puts another file's keys underneath. A key that
is not on this page is an error that names the nearest one; only `student` takes more: any field of
megatron-core's `TransformerConfig`, under its own name.

`${section.key}` stands for another key's value. `${oc.env:NAME}`, or `${oc.env:NAME,DEFAULT}`, stands for an
environment variable in {variables} and `include`, and is refused in every other key, as are variables whose
names say that they hold a secret (`..._KEY`, `..._TOKEN`, `..._PASSWORD`) and OmegaConf's other resolvers.
The run uses the variable's value; `config.yaml`, the report and Weights & Biases get `${oc.env:NAME}`, so a
saved configuration reads the environment again. A literal `${` is written `\\${`.

Everything that a run writes is closed to users outside the owner's group, whatever the umask; a stricter
umask is respected (077: the owner alone). A `run_dir` that others may enter stays as it is, and the run says
so.

When a run is resumed, every key is in one of three classes, which the last column of the tables names.
Those that *may change* do: the new value is used from the next step on, and the run says which keys those
are. Those that *must not change* end the start with an error that names the key, the old and the new value;
where they are *judged by content*, a path may be another when the weights, the tokenizer or the prompts it
leads to are the same. Those that *change the data position* may change too: prompts go on where they were,
and none is skipped or repeated.
"""


def render() -> str:
    """The whole page as Markdown: the keys of the top level, then one table a section."""
    classes, hints = _sections()
    variables = ", ".join(f"`{key}`" for key in MAY_NAME_VARIABLES)
    filled = _HEAD.replace("{variables}", variables)
    head = "\n\n".join(map(_wrapped, filled.strip().split("\n\n")))
    parts = [
        f"{head}\n",
        "## Top level\n",
        _table(schema.Config, skip=set(classes)),
    ]
    for name, cls in classes.items():
        listed = typing.get_origin(hints[name]) is list
        title = f"## `{name}`" + (" (a list; keys of one entry)" if listed else "")
        parts += [f"{title}\n", _paragraph(inspect.getdoc(cls) or "") + "\n", _table(cls)]
        parts += _entries(cls, name)
    return "\n".join(parts)


def _sections() -> tuple[dict[str, type], dict[str, typing.Any]]:
    """Key of the top level -> its dataclass (of the list's entries, for a list), in the order written."""
    hints = typing.get_type_hints(schema.Config)
    return {key: cls for key, hint in hints.items() if (cls := _dataclass_in(hint))}, hints


def _dataclass_in(hint: typing.Any) -> type | None:
    if dataclasses.is_dataclass(hint):
        return hint
    return next((cls for arg in typing.get_args(hint) if (cls := _dataclass_in(arg))), None)


def _entries(cls: type, where: str) -> list[str]:
    """Tables of the dataclasses that a section holds lists of, each once."""
    found: dict[type, list[str]] = {}
    for key, hint in typing.get_type_hints(cls).items():
        if (inner := _dataclass_in(hint)) is not None:
            found.setdefault(inner, []).append(f"`{where}.{key}`")
    parts = []
    for inner, keys in found.items():
        parts += [f"### An entry of {' or '.join(keys)}\n", _paragraph(inspect.getdoc(inner) or "") + "\n"]
        parts.append(_table(inner))
    return parts


def _table(cls: type, skip: typing.Collection[str] = ()) -> str:
    documentation, hints = field_documentation(cls), typing.get_type_hints(cls, include_extras=True)
    lines = ["| key | type | default | meaning | when resumed |", "|---|---|---|---|---|"]
    for item in dataclasses.fields(cls):
        if item.name in skip:
            continue
        name = "any `TransformerConfig` field" if item.name == "transformer" else f"`{item.name}`"
        meaning, kind = split_documentation(documentation[item.name])
        kind_of_value = type_name(hints[item.name]).replace("'", "`")
        cells = [name, kind_of_value, _default(item), meaning, kind.value if kind else ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False))


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def _default(item: dataclasses.Field) -> str:
    value = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    return f"`{value}`" if value != "" else '`""`'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare, do not write")
    if not parser.parse_args().check:
        PAGE.write_text(render(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != render():
        sys.exit("docs/configuration.md is out of date; run: python tools/document_configuration.py")


if __name__ == "__main__":
    main()
