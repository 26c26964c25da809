"""What all tests share: megatron-core is imported once, before any rank is forked, and the parent never
computes."""

import os
import warnings
from pathlib import Path

import pytest

from tests import _distributed, _unwritten_memory  # noqa: F401  (one intra-op thread before anything else)

_MOST_PROCESSES = 4
"""A test has up to eight ranks of its own, and every process imports everything."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per core for whole folders; single files are done sooner where they are collected."""
    if all(Path(argument.split("::")[0]).is_file() for argument in config.args):
        return 0
    return min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """Warnings that this package causes or gives are errors; pytest restores the filters after each test."""
    warnings.filterwarnings("error", category=UserWarning, module=r"megatron_mopd\b")
    return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every process has to name the tests alike: an object's address in a name differs."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: give its parameters `ids`")
