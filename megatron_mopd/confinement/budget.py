"""Time limits for library code that runs in this process and cannot be interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def within(seconds: float, function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)`, run on a thread of its own.

    Raises `TimeoutError` when it does not return within `seconds` (the thread then goes on until the process
    ends, so that the caller should end soon too), and `RuntimeError` for what is no `Exception`: a panic of a
    library written in Rust is one of Python's `BaseException`s. The function has to release the interpreter's
    lock while it is busy, as tokenizers and other compiled libraries do.
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
