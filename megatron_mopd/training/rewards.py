"""Asynchronous rewards of a rollout batch: verifiers start after sampling, and nothing waits for them until a
loss needs one of their scores.

A thread of every rank exchanges the scores on a separate process group, so that a rank can take part while
its main thread is anywhere in a plan.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import Config, DomainObjectives
from megatron_mopd.config.objectives import needs_rewards
from megatron_mopd.data.reward_workers import RewardWorkers, scores_of
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.data.verifiers import Score

# Some ranks enter an exchange right after sampling, the last one when its verifiers are done, for which
# `rewards.timeout_seconds` only sets a limit per response.
_PATIENCE = timedelta(days=1)

Judged = list[tuple[float | None, bool]]
"""For every judged response: its reward (`None` without a verdict), and whether its verifier crashed."""


class Rewarder:
    """Judges the trajectories of the domains whose objective needs rewards.

    Every data-parallel rank judges the responses that it sampled, so no tokens move, in worker processes of
    its first tensor-, context- and pipeline-parallel rank, which run while teachers score. Construction is
    collective over all ranks: it creates a gloo process group if any objective needs rewards.
    """

    def __init__(self, config: Config, groups: ParallelGroups, decode: Callable[[Sequence[int]], str]):
        self._groups, self._decode = groups, decode
        self._objectives = DomainObjectives(config.objective)
        self._workers = None
        if groups.replica_rank == 0:
            self._workers = RewardWorkers(config.rewards.workers, config.rewards.timeout_seconds)
        self._exchanges: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        if any(map(needs_rewards, self._objectives.all())):
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            # Not an executor, because the interpreter would wait for its thread at exit.
            threading.Thread(target=self._serve, name="reward-exchange", daemon=True).start()

    def start(self, trajectories: Sequence[Trajectory]) -> PendingRewards:
        """Start judging a rollout batch (the same list on every rank, with tokens where they were sampled).
        Returns immediately; collectives run in the background: one all-reduce over all ranks of 4 float64 per
        judged response.
        """
        wanted = [t for t in trajectories if needs_rewards(self._objectives.of(t.domain))]
        if not wanted:
            return NO_REWARDS
        mine, futures = [], []
        if self._workers is not None:
            rank, ranks = self._groups.dp.rank(), self._groups.dp_size
            mine = [place for place, t in enumerate(wanted) if t.judge(ranks) == rank]
            pairs = [(wanted[i].prompt, self._decode(wanted[i].response_ids.tolist())) for i in mine]
            futures = self._workers.submit(pairs)
        pending = PendingRewards([t.index for t in wanted])
        self._exchanges.put(lambda: pending.set(lambda: self._exchange(len(wanted), mine, futures)))
        return pending

    def close(self) -> None:
        """Stop the worker processes and the thread."""
        self._exchanges.put(None)
        if self._workers is not None:
            self._workers.close()

    def _serve(self) -> None:
        while (exchange := self._exchanges.get()) is not None:
            exchange()

    def _exchange(self, count: int, mine: Sequence[int], futures: Sequence[Future[list[Score]]]) -> Judged:
        """All ranks' scores. A rank that cannot judge tells the others, which would otherwise hang."""
        judged = torch.zeros(count, 4, dtype=torch.float64)
        problem = None
        try:
            for place, score in zip(mine, scores_of(futures), strict=True):
                judged[place, :3] = torch.tensor(
                    [score.raw or 0.0, score.raw is not None, score.crashed], dtype=torch.float64
                )
        except BaseException as error:
            problem = error
            judged[:, 3] = 1.0
        dist.all_reduce(judged, group=self._group)
        if problem is not None:
            raise problem
        if judged[:, 3].any():
            raise RuntimeError("another rank could not have its responses judged")
        return [
            (value if is_judged else None, bool(crashed)) for value, is_judged, crashed, _ in judged.tolist()
        ]


class PendingRewards:
    """The rewards of one rollout batch, available later."""

    def __init__(self, indices: Sequence[int] = ()):
        """`indices` of the trajectories that are judged."""
        self._indices = indices
        self._judged: Future[Judged] = Future()
        if not indices:
            self._judged.set_result([])

    def set(self, judge: Callable[[], Judged]) -> None:
        """Run `judge` for the wanted trajectories and store its result or exception."""
        try:
            self._judged.set_result(judge())
        except BaseException as error:
            self._judged.set_exception(error)

    def collect(self) -> dict[int, float | None]:
        """Reward by trajectory index; `None` where the verifier failed. Equal on every rank.

        Waits for the verifiers of all ranks. No collectives in the caller's thread.
        """
        return {index: reward for index, (reward, _) in zip(self._indices, self._judged.result())}

    def crashes(self) -> int:
        """Number of responses on which the verifier crashed or timed out; waits like `collect`."""
        return sum(crashed for _, crashed in self._judged.result())


NO_REWARDS = PendingRewards()
"""For a batch in which no objective needs a reward."""
