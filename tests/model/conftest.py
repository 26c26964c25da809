"""Pools of forked ranks that the tests of one file share."""

import pytest

from tests._distributed import RankPool


@pytest.fixture(scope="module")
def pools():
    """Pools by size, forked once; a pool that a failure has killed is replaced for the next test."""
    made = {}

    def pool(size: int) -> RankPool:
        if size not in made or not made[size]._processes:
            made[size] = RankPool(size, timeout=120)
        return made[size]

    yield pool
    for each in made.values():
        each.close()
