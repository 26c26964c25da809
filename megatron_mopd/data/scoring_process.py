"""A verifier in a process of its own, which can be killed when it hangs."""

from __future__ import annotations

import json
import os
import pickle
import select
import subprocess
import sys
import threading
import time
from typing import Any

_START_SECONDS = 120.0
_LONGEST_REPLY = 128


class ScoringProcess:
    """A process that scores, started when first needed and replaced when it had to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def score(self, request: tuple[Any, ...], seconds: float) -> float | None:
        """The score, or `None` when the verifier raised, died or did not answer within `seconds`."""
        with self._lock:
            try:
                if self._process is None:
                    self._start()
                pickle.dump(request, self._process.stdin)
                self._process.stdin.flush()
                reply = self._reply(seconds)
                return float(reply) if isinstance(reply, (int, float)) else None
            except (OSError, TimeoutError, ValueError):
                self._process.kill()
                self._process.communicate()  # closes the pipes and collects the exit status
                self._process = None
                return None

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()
                self._process = None

    def _start(self) -> None:
        # One thread: it must not take the cores of the training process, nor address space for idle threads.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_mopd.data.scoring"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | threads | path,
        )
        self._reply(_START_SECONDS)

    def _reply(self, seconds: float) -> Any:
        """One line of JSON. It is not trusted: what was scored may have taken the process over."""
        deadline, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError
            part = os.read(self._process.stdout.fileno(), _LONGEST_REPLY)
            line += part
            if not part or len(line) > _LONGEST_REPLY:
                raise ValueError("the process ended, or says more than a score")
        return json.loads(line)
