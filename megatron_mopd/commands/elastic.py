"""torchrun without a traceback when it is asked to stop: `python -m megatron_mopd.commands.elastic ARGUMENTS`.

The arguments are torchrun's. Asked to stop, it has passed the signal on to its ranks and waited for them; what
is left is to say so in one line. The exit status is then the shells', 128 and the signal's number.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.run import main as torchrun


def main() -> None:
    """Becomes torchrun."""
    try:
        torchrun()
    except SignalException as stop:
        print(f"torchrun: ended its ranks after {stop.sigval.name}", file=sys.stderr)
        sys.exit(128 + stop.sigval)


if __name__ == "__main__":
    main()
