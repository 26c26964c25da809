"""Rewards of a rollout batch on their way: started after sampling, collected before the loss needs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property

import torch
import torch.distributed as dist

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import Config, DomainObjectives
from megatron_mopd.config.objectives import needs_rewards
from megatron_mopd.data.rewards import RewardWorkers, scores_of
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.data.verifiers import Score


class Rewarder:
    """Judges the trajectories of the domains whose objective asks for rewards.

    Every data-parallel rank judges a share, in the processes of its first tensor-, context- and
    pipeline-parallel rank, which run while teachers score.
    """

    def __init__(self, config: Config, groups: ParallelGroups, decode: Callable[[Sequence[int]], str]):
        self._groups, self._decode = groups, decode
        self._objectives = DomainObjectives(config.objective)
        judges = groups.is_first_stage and groups.tp.rank() == 0 and groups.cp.rank() == 0
        self._workers = None
        if judges:
            self._workers = RewardWorkers(config.rewards.workers, config.rewards.timeout_seconds)

    def start(self, trajectories: Sequence[Trajectory]) -> PendingRewards:
        """Begin to judge a rollout batch (the same list on every rank). No collectives."""
        wanted = [t for t in trajectories if needs_rewards(self._objectives.of(t.domain))]
        mine, futures = [], []
        if self._workers is not None:
            mine = list(range(self._groups.dp.rank(), len(wanted), self._groups.dp_size))
            pairs = [(wanted[i].prompt, self._decode(wanted[i].response_ids)) for i in mine]
            futures = self._workers.submit(pairs)
        return PendingRewards(self._groups.device, wanted, mine, futures)

    def close(self) -> None:
        """End the worker processes."""
        if self._workers is not None:
            self._workers.close()


class PendingRewards:
    """The rewards of one rollout batch, as far as asked for."""

    def __init__(
        self,
        device: torch.device,
        wanted: Sequence[Trajectory],
        mine: Sequence[int],
        futures: Sequence[Future[list[Score]]],
    ):
        """`wanted` are all judged trajectories, `mine` the places among them of those judged in `futures`."""
        self._device, self._wanted, self._mine, self._futures = device, wanted, mine, futures
        self.seconds_waited = 0.0
        """How long `collect` had to wait for the verifiers on this rank."""

    def collect(self) -> dict[int, float | None]:
        """Reward by trajectory index; `None` where the verifier failed. Equal on every rank.

        Collective the first time: one all-reduce over all ranks of 3 float64 a judged response.
        """
        return {
            t.index: (value if has_verdict else None)
            for t, (value, has_verdict, _) in zip(self._wanted, self._judged)
        }

    def crashes(self) -> int:
        """Responses on which the verifier crashed or took too long; call after `collect`."""
        return sum(bool(crashed) for *_, crashed in self._judged)

    @cached_property
    def _judged(self) -> list[list[float]]:
        if not self._wanted:
            return []
        started = time.perf_counter()
        judged = torch.zeros(len(self._wanted), 3, dtype=torch.float64)
        for place, score in zip(self._mine, scores_of(self._futures)):
            judged[place] = torch.tensor(
                [score.raw or 0.0, score.raw is not None, score.crashed], dtype=torch.float64
            )
        judged = judged.to(self._device)
        dist.all_reduce(judged)
        self.seconds_waited = time.perf_counter() - started
        return judged.tolist()


NO_REWARDS = PendingRewards(torch.device("cpu"), (), (), ())
"""For a batch in which no objective asks for a reward."""
