"""docs/configuration.md matches the dataclasses for every key."""

import dataclasses

import pytest

from megatron_mopd.config import schema
from tools import document_configuration as tool

CLASSES = [cls for cls in vars(schema).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)]


def test_the_page_is_up_to_date():
    written = tool.PAGE.read_text(encoding="utf-8")
    assert written == tool.render(), "run: python tools/document_configuration.py"


def test_every_class_and_key_is_on_the_page():
    page = tool.render()
    for cls in CLASSES:
        for item in dataclasses.fields(cls):
            section = f"## `{item.name}`" in page
            assert section or f"| `{item.name}` |" in page or item.name == "transformer", item.name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_key_says_what_it_means(cls):
    sections, _ = tool._sections()
    for name, text in tool.field_documentation(cls).items():
        assert text or (cls is schema.Config and name in sections), f"{cls.__name__}.{name} has no docstring"


def test_a_changed_page_is_noticed(tmp_path, monkeypatch):
    stale = tmp_path / "configuration.md"
    stale.write_text(tool.render().replace("`seed`", "`sead`"))
    monkeypatch.setattr(tool, "PAGE", stale)
    monkeypatch.setattr("sys.argv", ["document_configuration.py", "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        tool.main()
