"""Time limits for library code in this process that cannot be interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def within(seconds: float, function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)`, run on a separate thread.

    Raises `TimeoutError` if it does not return within `seconds` (the thread then runs until the process ends,
    so the caller should exit soon), and `RuntimeError` for errors that are not an `Exception`: a panic of a
    Rust library is a `BaseException`. The function must release the GIL while it is busy, as tokenizers and
    other compiled libraries do.
    """
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, function(*arguments)))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"not done after {seconds:g} s")
    succeeded, value = outcome[0]
    if succeeded:
        return value
    if isinstance(value, Exception):
        raise value
    raise RuntimeError(f"{type(value).__name__}: {value}")
