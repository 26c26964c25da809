"""What autograd does not tell in public."""

import torch


def graph_is_kept() -> bool:
    """Whether the running backward may be repeated (`retain_graph=True`); only inside a backward.

    If not, its buffers may be handed over instead of copied. Where this release of torch does not say, yes.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()
