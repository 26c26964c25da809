"""`ranks(tp, fn, *args)` runs a module-level `fn(rank, *args)` on `tp` ranks, forked once per session."""

import pytest

from tests._distributed import RankError, RankPool


class Ranks:
    def __init__(self):
        self._pools = {}

    def __call__(self, world_size, fn, *args, timeout=60):
        if world_size not in self._pools:
            self._pools[world_size] = RankPool(world_size)
        try:
            return self._pools[world_size].run(fn, *args, timeout=timeout)
        except RankError:
            del self._pools[world_size]  # its ranks were killed; the next test gets new ones
            raise

    def close(self):
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope="session")
def ranks():
    pools = Ranks()
    yield pools
    pools.close()
