"""A confined process with nothing to do, from which to learn what this machine's kernel offers."""

from __future__ import annotations

from megatron_mopd.confinement.server import WorkerLimits, serve

if __name__ == "__main__":
    serve({}, WorkerLimits(), checks_evaluation=False)
