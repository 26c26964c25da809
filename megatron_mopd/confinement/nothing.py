"""A confined process with nothing to do, from which to learn what this machine's kernel offers."""

from __future__ import annotations

from megatron_mopd.confinement.server import Limits, serve

if __name__ == "__main__":
    serve({}, Limits(), checks_evaluation=False)
