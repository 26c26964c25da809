"""`pip install .` installs every package, the launchers and recipes, and programs that start."""

from __future__ import annotations

import importlib
import os
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from megatron_mopd.commands import launch

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROGRAMS = PROJECT["project"]["scripts"]
REPOSITORY_ONLY = """
    demo document_configuration draw_architecture draw_documentation fetch_real_model make_small_experts
""".split()
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names of the files in a wheel of this tree, built without a network."""
    directory = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("megatron_mopd", "launch"):
        shutil.copytree(ROOT / name, directory / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(directory / "dist")],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    (file,) = (directory / "dist").glob("*.whl")
    return set(zipfile.ZipFile(file).namelist())


def test_the_wheel_has_every_module_launcher_and_recipe(wheel):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_mopd").rglob("*.py")}
    launchers = {
        f"megatron_mopd/{path.relative_to(ROOT)}"
        for path in (ROOT / "launch").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(modules) > 100 and len(launchers) > 10
    assert modules | launchers | {"megatron_mopd/py.typed"} <= wheel
    assert not any(name.startswith(("tests/", "tools/", "benchmarks/")) for name in wheel)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_can_be_started(program):
    module, function = PROGRAMS[program].split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_is_a_program_or_belongs_to_the_repository(tool, monkeypatch, capsys):
    name = Path(tool).stem
    if name in REPOSITORY_ONLY:
        return
    entry = f"megatron_mopd.commands.{name}:main"
    assert PROGRAMS[f"mopd-{name.replace('_', '-')}"] == entry
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    assert end.value.code in (0, None)
    assert "usage: " in capsys.readouterr().out


def test_launch_program(tmp_path, monkeypatch, capsys):
    assert launch.launch_directory() == ROOT / "launch"
    monkeypatch.setattr(sys, "argv", ["mopd-launch", "--copy", str(tmp_path / "mine")])
    launch.main()
    assert (tmp_path / "mine" / "recipes" / "glm5.yaml").is_file()
    assert os.access(tmp_path / "mine" / "train.sh", os.X_OK)
    with pytest.raises(SystemExit, match="already exists"):
        launch.main()
    started = []
    monkeypatch.setattr(os, "execvpe", lambda *call: started.append(call))
    monkeypatch.setattr(sys, "argv", ["mopd-launch", "--config", "c.yaml"])
    launch.main()
    ((shell, command, environment),) = started
    assert command == ["bash", str(ROOT / "launch" / "train.sh"), "--config", "c.yaml"]
    assert environment["PYTHON"] == sys.executable


def test_only_commands_silence_dependencies():
    """Importing the library changes no warning filter of its user's process."""
    code = (
        "import warnings; before = list(warnings.filters); import megatron_mopd.backend.messages;"
        "assert warnings.filters == before; import megatron_mopd.commands;"
        "assert any('Apex' in str(message) for _, message, *_ in warnings.filters)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
