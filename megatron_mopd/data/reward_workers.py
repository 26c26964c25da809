"""Rewards of a rollout batch, computed in worker processes while the training thread does other work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.scoring_process import ScoringProcess
from megatron_mopd.data.verifiers import SCORED_AT_ONCE, Score, judge


class RewardWorkers:
    """`workers` verifier processes, each driven by a thread that only waits for it.

    A response whose verifier crashes or takes longer than `timeout_seconds` gets `Score(None, crashed=True)`;
    its process is replaced and the next responses are scored as usual. No response makes a method raise.
    """

    def __init__(self, workers: int, timeout_seconds: float):
        self._timeout = timeout_seconds
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._processes = [ScoringProcess() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(process,), name="rewards", daemon=True)
            for process in self._processes
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, responses: Sequence[tuple[Prompt, str]]) -> list[Future[list[Score]]]:
        """Submit (prompt, response text) pairs; immediately returns futures of consecutive batches of
        scores."""
        futures = []
        for start in range(0, len(responses), SCORED_AT_ONCE):
            future: Future[list[Score]] = Future()
            self._tasks.put((responses[start : start + SCORED_AT_ONCE], future))
            futures.append(future)
        return futures

    def close(self) -> None:
        """End threads and processes; responses not scored yet are dropped."""
        for _ in self._threads:
            self._tasks.put(None)
        for process in self._processes:
            process.close()

    def _serve(self, process: ScoringProcess) -> None:
        while (task := self._tasks.get()) is not None:
            responses, future = task
            try:
                future.set_result(judge(responses, process, self._timeout))
            except BaseException as error:  # not an error of a response: pass it to the waiting thread
                future.set_exception(error)


def scores_of(futures: Sequence[Future[list[Score]]]) -> list[Score]:
    """The scores of all submitted responses in order; waits for those that are not finished yet."""
    return [score for future in futures for score in future.result()]
