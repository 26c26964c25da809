"""Which packages are installed, in which version, and whether they can be imported.

The module imports only the standard library at the top, because it must work if packages are missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from megatron_mopd.backend.finding import Finding, Level

DISTRIBUTION = "megatron_mopd"
_MODULES = {"megatron-core": "megatron.core"}
"""Distributions whose module name differs from their name with underscores."""


@dataclass(frozen=True)
class OptionalPackage:
    """A package that training does not require, and how to install it."""

    distributions: tuple[str, ...]
    module: str
    how: str


# The distribution called `apex` on PyPI is a different project; NVIDIA's is built from its repository.
APEX_FROM_SOURCE = (
    "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v "
    "--no-build-isolation . (the package called apex on PyPI is something else)"
)
OPTIONAL = {
    "Transformer Engine": OptionalPackage(
        ("transformer-engine", "transformer_engine"),
        "transformer_engine.pytorch",
        "pip install --no-build-isolation 'transformer-engine[pytorch]'",
    ),
    "Apex": OptionalPackage(("apex",), "apex", APEX_FROM_SOURCE),
    "flash-attn": OptionalPackage(
        ("flash-attn", "flash_attn"), "flash_attn", "pip install flash-attn --no-build-isolation"
    ),
    "Triton": OptionalPackage(("triton",), "triton", "pip install triton"),
    "wandb": OptionalPackage(("wandb",), "wandb", "pip install wandb"),
}


@dataclass(frozen=True)
class Found:
    """The state of an optional package: its version, or why it cannot be used."""

    version: str | None
    error: str | None = None

    @property
    def works(self) -> bool:
        return self.version is not None and self.error is None


def requirements() -> list[str]:
    """The requirements of this package, from the `pyproject.toml` of the source tree or from the installed
    metadata.
    """
    source = Path(__file__).parents[2] / "pyproject.toml"
    if source.exists():
        needed = tomllib.loads(source.read_text())["project"]["dependencies"]
    else:
        needed = importlib.metadata.requires(DISTRIBUTION) or []
    return [text for text in needed if "extra ==" not in text and _is_for_this_system(text)]


def _is_for_this_system(requirement: str) -> bool:
    system = re.search(r"sys_platform\s*==\s*['\"](\w+)", requirement)
    return system is None or system[1] == sys.platform


def required_findings() -> list[Finding]:
    """Python and every required package, in the order of `pyproject.toml`."""
    version = ".".join(map(str, sys.version_info[:3]))
    findings = [Finding(Level.OK, "Python", f"{version} ({sys.executable})")]
    return findings + [_required(text) for text in requirements()]


def _required(requirement: str) -> Finding:
    name = requirement
    for mark in "<>=!~;[ ":
        name = name.split(mark)[0]
    how = f"pip install '{requirement}'"
    found = installed_version((name,))
    module = _MODULES.get(name, name.replace("-", "_"))
    if found is None or not _is_importable(module):
        return Finding(Level.PROBLEM, name, "not installed", how)
    if not _is_allowed(requirement, found):
        allowed = requirement.removeprefix(name).partition(";")[0]
        return Finding(Level.PROBLEM, name, f"{found}, but this package needs {allowed}", how)
    return Finding(Level.OK, name, found)


def installed_version(distributions: tuple[str, ...]) -> str | None:
    """The version of the first installed one of these distributions."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # its parent package is missing
        return False


def _is_allowed(requirement: str, version: str) -> bool:
    try:
        from packaging.requirements import Requirement  # a dependency of megatron-core, may be missing
    except ImportError:
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def find_optional(name: str) -> Found:
    """Look for an optional package and import it, because it may have been built for a different torch."""
    package = OPTIONAL[name]
    version = installed_version(package.distributions)
    try:
        module = importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if version is None and package.module.split(".")[0] == missing.split(".")[0]:
            return Found(None)
        return Found(version or "unknown version", f"cannot be imported: {error}")
    except Exception as error:  # a broken extension may raise anything
        return Found(version or "unknown version", f"cannot be imported: {_first_line(error)}")
    version = version or getattr(module, "__version__", "unknown version")
    if name == "Apex" and not _is_importable("apex.multi_tensor_apply"):
        return Found(version, "not NVIDIA's Apex: the package called apex on PyPI is something else")
    return Found(version)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
