"""torchrun without a traceback when it is asked to stop.

    python -m megatron_mopd.commands.elastic ARGUMENTS      # torchrun's

Asked to stop, torchrun has passed the signal on to its ranks and waited for them; what is left is to say so
in one line. The exit status is then the shells', 128 and the signal's number.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.run import main as torchrun

from megatron_mopd.backend.messages import visible


def main() -> None:
    """Becomes torchrun."""
    try:
        torchrun()
    except SignalException as stop:
        print(visible(f"torchrun: ended its ranks after {stop.sigval.name}"), file=sys.stderr)
        sys.exit(128 + stop.sigval)


if __name__ == "__main__":
    main()
