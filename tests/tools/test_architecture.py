"""The layers of docs/architecture.md: no import goes up, and the diagram's arrows cover every import."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "tools" / "draw_architecture.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("draw_architecture", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_import_goes_up(tool):
    assert tool.imports_that_go_up() == []
    assert tool.imports()["train", "run"] > 0


def test_an_import_that_goes_up_is_found(tool, tmp_path):
    for name, text in {
        "model/low.py": "from megatron_mopd.training.step import train_step\n",
        "elsewhere/module.py": "import megatron_mopd.config\n",
        "train.py": "import torch\nfrom megatron_mopd.model import build\n",
    }.items():
        path = tmp_path / "megatron_mopd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    tool.PACKAGE = tmp_path / "megatron_mopd"
    assert tool.imports_that_go_up() == ["elsewhere has no layer", "model imports training"]


def test_arrows_imply_every_import(tool):
    arrows = tool.direct_imports()
    depth = {name: number for number, names in enumerate(tool.LAYERS) for name in names}

    def reaches(start, end):
        return start == end or any(reaches(b, end) for a, b in arrows if a == start)

    across = [pair for pair in tool.imports() if depth[pair[0]] < depth[pair[1]]]
    assert len(arrows) < len(across) and all(reaches(*pair) for pair in across)
