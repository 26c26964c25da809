"""Caches the results of teacher forward passes until the loss: last-layer hidden states or log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mopd.config import ConfigError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class HiddenCache:
    """Teacher hidden states [response tokens of this CP rank, h_teacher], keyed by (trajectory index, teacher
    name), on the last pipeline stage.

    Each is held in page-locked host memory (`placement` "host") or on the device until the loss has used it,
    in the precision of the model unless `dtype` is given: the cache rounds to fewer bits only on request. The
    placement does not affect results.

    `budget`: maximum number of bytes held at once; exceeding it is an error, because a step's plan stays
    within it by alternating scoring and training (`states_within`).

    For trajectories whose objective compares sampled tokens only, `put_log_probs` stores the log-probs [n], a
    few bytes per token, instead of the states.
    """

    def __init__(
        self,
        device: torch.device,
        placement: str = "host",
        dtype: str | None = None,
        budget: int | None = None,
    ):
        self.device = device
        self._home = device if placement == "device" else torch.device("cpu")
        self._dtype = DTYPES[dtype] if dtype else None
        self._budget = budget
        self._states: dict[tuple[str, int, str], tuple[Tensor, torch.dtype]] = {}
        self._bytes = 0
        self.peak_bytes = 0

    def itemsize(self, params_dtype: torch.dtype) -> int:
        """Bytes per element for a model that computes in `params_dtype`."""
        return (self._dtype or params_dtype).itemsize

    def put(self, index: int, teacher: str, hidden: Tensor) -> None:
        """Store a detached copy of `hidden` [n, h]; the original may be freed."""
        self._keep(("hidden", index, teacher), hidden, self._dtype or hidden.dtype)

    def pop(self, index: int, teacher: str) -> Tensor:
        """Remove and return the states of one trajectory, on the run's device and in their original
        precision."""
        return self._release(("hidden", index, teacher))

    def put_log_probs(self, index: int, teacher: str, log_probs: Tensor) -> None:
        """Store a teacher's log-probs [n] of a trajectory's sampled tokens, in their original precision."""
        self._keep(("log_probs", index, teacher), log_probs, log_probs.dtype)

    def pop_log_probs(self, index: int, teacher: str) -> Tensor:
        """Remove and return the log-probs of one trajectory, on the run's device."""
        return self._release(("log_probs", index, teacher))

    def _keep(self, key: tuple[str, int, str], values: Tensor, dtype: torch.dtype) -> None:
        kind, index, teacher = key
        assert key not in self._states, f"{kind} of trajectory {index}, teacher {teacher!r}: scored twice"
        pin = values.is_cuda and self._home.type == "cpu"
        kept = torch.empty(values.shape, dtype=dtype, device=self._home, pin_memory=pin)
        kept.copy_(values.detach(), non_blocking=True)
        self._states[key] = kept, values.dtype
        self._bytes += kept.numel() * kept.element_size()
        if self._budget is not None and self._bytes > self._budget:
            raise RuntimeError(
                f"hidden states of {self._bytes} bytes are waiting for the loss, and "
                f"teacher_storage.hidden_cache_bytes is {self._budget}"
            )
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def _release(self, key: tuple[str, int, str]) -> Tensor:
        kept, dtype = self._states.pop(key)
        self._bytes -= kept.numel() * kept.element_size()
        return kept.to(self.device, non_blocking=True).to(dtype)

    def __len__(self) -> int:
        return len(self._states)


def states_within(budget: int, largest: int) -> int:
    """How many scored micro-batches of at most `largest` bytes each fit into `budget` bytes.

    Raises `ConfigError` if not even one fits.
    """
    if largest > budget:
        raise ConfigError(
            f"teacher_storage.hidden_cache_bytes: {budget} cannot hold the hidden states of one micro-batch, "
            f"which take {largest} bytes; raise it, or make micro-batches smaller"
        )
    return budget // max(largest, 1)
