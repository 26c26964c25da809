"""Configuration of all tests: megatron-core is imported once, before any rank is forked, and the parent
process uses one intra-op thread."""

import os
import warnings
from pathlib import Path

import pytest

from tests import _distributed, _unwritten_memory  # noqa: F401  (one intra-op thread before anything else)

_MOST_PROCESSES = 4
"""Maximum pytest-xdist workers: a test starts up to eight ranks, and every process imports everything."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per core for whole folders; single files finish sooner in the main process."""
    if all(Path(argument.split("::")[0]).is_file() for argument in config.args):
        return 0
    return min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """Turn warnings from this package into errors; pytest restores the filters after each test."""
    warnings.filterwarnings("error", category=UserWarning, module=r"megatron_mopd\b")
    return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Reject test names that contain an object's address: xdist needs the same names in every process."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: give its parameters `ids`")
