"""Private autograd queries."""

import torch


def graph_is_kept() -> bool:
    """Whether the running backward pass may be repeated (`retain_graph=True`); call only inside a backward.

    If not, its buffers may be reused instead of copied. True if this torch release cannot tell.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()
