"""What happens when a run is resumed with a different configuration, key by key.

The last sentence of a key's docstring names its class:

    On resume: may change.                           the new value is used from the next step on
    On resume: must not change.                      the resume is refused
    On resume: must not change, judged by content.   a path may change if its content is the same
    On resume: changes the data position.            prompts continue in order, none skipped or repeated
"""

from __future__ import annotations

import dataclasses
import enum
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_mopd.backend.messages import visible
from megatron_mopd.config.documentation import field_documentation
from megatron_mopd.config.schema import Config, ModelConfig


class ResumeClass(enum.Enum):
    """The text after `On resume:` in a docstring."""

    MAY_CHANGE = "may change"
    MUST_NOT_CHANGE = "must not change"
    SAME_CONTENT = "must not change, judged by content"
    DATA_POSITION = "changes the data position"


_SENTENCE = re.compile(r" ?On resume: ([^.]+)\.$")
_LONGEST_SHOWN = 60
EXECUTION_FIELDS = frozenset(
    {
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "recompute_modules",
        "moe_token_dispatcher_type",
    }
)
"""Fields of `TransformerConfig` that affect only how the model is computed: these may change."""


@dataclass(frozen=True)
class Change:
    """A key whose value differs from the saved run's."""

    key: str
    """Dotted, as a user writes it: `optimizer.lr`, `teachers[math].kl_floor`, `data.prompts[0].path`."""
    old: Any
    new: Any
    kind: ResumeClass

    def __str__(self) -> str:
        return f"{visible(self.key)} {_shown(self.old)} -> {_shown(self.new)}"

    def refusal(self, path: object) -> str:
        """Why the checkpoint `path` cannot be resumed: one sentence with both values."""
        what = "the architecture " if self.key.startswith("student.") else ""
        return (
            f"{visible(self.key)}: {what}must not change when a run is resumed ({_shown(self.old)} in "
            f"{path}, now {_shown(self.new)}); restore the old value, or start a new run_dir"
        )


def split_documentation(text: str) -> tuple[str, ResumeClass | None]:
    """A key's documentation without its last sentence, and the class that this sentence names, if any."""
    if (found := _SENTENCE.search(text)) is None:
        return text, None
    return text[: found.start()], ResumeClass(found[1])


def changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    """The keys that differ between two configurations in the form of `to_dict`, in the schema's order.

    A key that one of them lacks, because a different release wrote it, has its default there. For lists of
    different lengths, the length and the common entries are compared.
    """
    old = {leaf.key: leaf for leaf in _leaves(Config, saved, "")}
    new = {leaf.key: leaf for leaf in _leaves(Config, current, "")}
    found = []
    for key in [*new, *(key for key in old if key not in new)]:
        if "[" in key and (key in old) != (key in new):
            continue
        before, now = (side[key].value if key in side else None for side in (old, new))
        if before != now:
            found.append(Change(key, before, now, (new.get(key) or old[key]).kind))
    return found


def leaves(config: Config) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a configuration, with the values of environment variables."""
    values = dataclasses.asdict(config)
    values["student"] |= values["student"].pop("transformer")
    return ((leaf.key, leaf.value) for leaf in _leaves(Config, values, ""))


class _Leaf(NamedTuple):
    key: str
    value: Any
    kind: ResumeClass


def _leaves(
    cls: type, values: Mapping[str, Any], where: str, kind: ResumeClass | None = None
) -> Iterator[_Leaf]:
    """Everything below a section; mappings with user-defined keys are not split.

    kind: the class of the list that the section is an entry of. If a list may change, so may its entries.
    """
    hints, documentation = typing.get_type_hints(cls), field_documentation(cls)
    known = {item.name: item for item in dataclasses.fields(cls)}
    for name, item in known.items():
        key, inner = f"{where}{name}", _section(hints[name])
        _, own = split_documentation(documentation[name])
        own = kind if kind is ResumeClass.MAY_CHANGE else own or kind
        if inner is not None and typing.get_origin(hints[name]) is list:
            if own is not None:
                yield _Leaf(f"{key} (entries)", len(values.get(name, ())), own)
            for number, entry in enumerate(values.get(name, ())):
                # Teachers are identified by name, regardless of their order.
                yield from _leaves(inner, entry, f"{key}[{entry.get('name') or number}].", own)
        elif inner is not None:
            yield from _leaves(inner, values.get(name, {}), f"{key}.", own)
        else:
            assert own is not None, f"the docstring of {key} does not say what happens on resume"
            if cls is ModelConfig and name == "transformer":
                for field in sorted(values.keys() - known.keys()):
                    may = field in EXECUTION_FIELDS
                    yield _Leaf(f"{where}{field}", values[field], ResumeClass.MAY_CHANGE if may else own)
            else:
                yield _Leaf(key, values[name] if name in values else _default(item), own)


def _default(item: dataclasses.Field) -> Any:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default


def _section(hint: Any) -> type | None:
    """The dataclass of a section or of a list's entries."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next((inner for argument in typing.get_args(hint) if (inner := _section(argument))), None)


def _shown(value: Any) -> str:
    """A value in a message. Of a long one only the end is shown, where paths differ."""
    text = "not set" if value is None else visible(repr(value))
    return text if len(text) <= _LONGEST_SHOWN else f"...{text[-_LONGEST_SHOWN:]}"
