"""Pools of forked ranks shared by the tests of one file."""

import pytest

from tests._distributed import RankPool


@pytest.fixture(scope="module")
def pools():
    """Pools by size, forked once; after a failure kills a pool, the next test gets a new one."""
    made = {}

    def pool(size: int) -> RankPool:
        if size not in made or not made[size]._processes:
            made[size] = RankPool(size, timeout=120)
        return made[size]

    yield pool
    for each in made.values():
        each.close()
