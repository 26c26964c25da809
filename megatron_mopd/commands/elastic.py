"""torchrun without a traceback when it is asked to stop.

    python -m megatron_mopd.commands.elastic ARGUMENTS      # torchrun's

When asked to stop, torchrun forwards the signal to its ranks, waits for them, and raises. Here this prints
one line, and the exit status is 128 plus the signal number, as in shells.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.run import main as torchrun

from megatron_mopd.backend.messages import visible


def main() -> None:
    """Run torchrun."""
    try:
        torchrun()
    except SignalException as stop:
        print(visible(f"torchrun: ended its ranks after {stop.sigval.name}"), file=sys.stderr)
        sys.exit(128 + stop.sigval)


if __name__ == "__main__":
    main()
