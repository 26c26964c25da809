"""Arrays of tokens and log-probs, so that no Python object exists per token; and values that contain them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

BYTES_PER_ID = 4


def id_array(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """[n] int32; an int32 array is returned as it is."""
    return np.asarray(ids, dtype=np.int32)


def logprob_array(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """[n] float32 or float64; float64 if `values` are Python numbers."""
    array = np.asarray(values)
    return array if array.dtype == np.float32 else array.astype(np.float64, copy=False)


def logprob_dtype(params_dtype: torch.dtype) -> np.dtype:
    """The dtype in which the log-probs of a student's samples are kept: that of its losses."""
    return np.dtype(np.float64 if params_dtype == torch.float64 else np.float32)


def joined(parts: Sequence[np.ndarray], dtype: np.dtype | type) -> list[np.ndarray]:
    """The same arrays, converted, as consecutive views of one flat array."""
    flat = np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype, casting="same_kind")
    return np.split(flat, np.cumsum([len(part) for part in parts]))[:-1]


class EqualByValue:
    """Base of frozen dataclasses (`eq=False`) with arrays, which are compared by their bytes."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values(hashed=False) == other._values(hashed=False)

    def __hash__(self) -> int:
        return hash(self._values(hashed=True))

    def _values(self, hashed: bool) -> tuple:
        names = [f.name for f in dataclasses.fields(self) if not hashed or f.hash is not False]
        values = (getattr(self, name) for name in names)
        return tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in values)
