"""The verdict on a case: runs both sides on pools of forked ranks and compares them."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass

from megatron_mopd.config import ConfigError, DomainObjectives, config_from_dict
from megatron_mopd.config.objectives import needs_teachers
from megatron_mopd.run import inputs
from megatron_mopd.teachers.routing import Routing
from tests._distributed import RankError, RankPool
from tests.fuzz_layouts.case import Case
from tests.fuzz_layouts.compare import differences
from tests.fuzz_layouts.run import Outcome, run_case


@dataclass(frozen=True)
class Verdict:
    """kind: `right`, `refused` (a `ConfigError` before anything is trained), `wrong` (values differ),
    `failed` (an exception) or `hangs`."""

    kind: str
    detail: str = ""

    @property
    def is_fine(self) -> bool:
        return self.kind in ("right", "refused")

    @property
    def signature(self) -> str:
        """The part of the verdict that a smaller case must share to count as the same failure."""
        return self.kind if self.kind == "wrong" else f"{self.kind}: {self.last_line[:70]}"

    @property
    def last_line(self) -> str:
        """The message of the exception."""
        lines = [line for line in self.detail.splitlines() if line.strip()]
        return next((line for line in reversed(lines) if not line.startswith("on pipeline stage")), "")


_CASES_PER_FORK = 8
"""Cases per pool. megatron-core's DistributedDataParallel is part of a reference cycle that the garbage
collector does not see, so its process groups stay alive, and their threads slow down all later cases."""


class Pools:
    """Pools of ranks by size: one of a single rank, and others as long as they fit into `most` processes."""

    def __init__(self, timeout: float = 150, most: int = 8):
        self._timeout, self._most = timeout, most
        self._pools: dict[int, RankPool] = {}
        self._served: Counter[int] = Counter()

    def pool(self, ranks: int) -> RankPool:
        """The pool of this size, forked if it does not exist or has served `_CASES_PER_FORK` cases."""
        if ranks in self._pools and self._served[ranks] >= _CASES_PER_FORK:
            self._pools.pop(ranks).close()
        self._served[ranks] += 1
        if ranks not in self._pools:
            self._served[ranks] = 1
            for other in sorted(self._pools.keys() - {1}):
                if sum(self._pools) + ranks > self._most:
                    self._pools.pop(other).close()
            self._pools[ranks] = RankPool(ranks, self._timeout)
        return self._pools[ranks]

    def run_both(self, case: Case, directory: str) -> tuple[list, list]:
        """The outcomes of one rank and of the layout, computed concurrently. Raises `RankError`."""
        if case.ranks == 1:
            one = many = self.pool(1)
            expected = one.run(run_case, case, f"{directory}/reference", True)
            return expected, many.run(run_case, case, f"{directory}/layout", False)
        one, many = self.pool(1), self.pool(case.ranks)
        try:
            one.start(run_case, case, f"{directory}/reference", True)
            many.start(run_case, case, f"{directory}/layout", False)
            found = many.collect()
            return one.collect(), found
        except BaseException:
            self.drop(1, case.ranks)
            raise

    def drop(self, *sizes: int) -> None:
        """Kill these pools; their remaining work is discarded."""
        for size in sizes:
            if (pool := self._pools.pop(size, None)) is not None:
                pool.close(kill=True)

    def close(self) -> None:
        for size in list(self._pools):
            self._pools.pop(size).close()

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def judge(case: Case, pools: Pools) -> Verdict:
    """Run a case on one rank and on its layout, and compare."""
    if problem := refusal(case):
        return Verdict("refused", problem)
    with tempfile.TemporaryDirectory() as directory:
        try:
            (expected,), outcomes = pools.run_both(case, directory)
        except RankError as error:
            pools.drop(1, case.ranks)
            return Verdict("hangs" if "no answer from ranks" in str(error) else "failed", str(error))
    refusals = {outcome for outcome in (expected, *outcomes) if isinstance(outcome, str)}
    if refusals:
        if isinstance(expected, Outcome) and all(isinstance(o, str) for o in outcomes) and len(refusals) == 1:
            return Verdict("refused", refusals.pop())
        return Verdict("failed", f"not all ranks refuse alike: {sorted(refusals)}")
    problems = differences(case, expected, outcomes)
    return Verdict("wrong", "\n".join(problems)) if problems else Verdict("right")


def refusal(case: Case) -> str | None:
    """The error that rejects a case before anything is built; `None` if it may start."""
    try:
        config = config_from_dict(case.config_values("unused", reference=False))
        student = case.model_config(case.student | case.recompute)
        inputs.check_layout(config, case.ranks, student, case.sources())
        inputs.check_batch(config)
        scored = DomainObjectives(config.objective).any(needs_teachers, case.domains)
        Routing(config.routing, case.sources()).check(case.domains, scored=scored)
    except ConfigError as error:
        return str(error)
    return None
