"""A confined process without handlers, started only to find out what this machine's kernel supports."""

from __future__ import annotations

from megatron_mopd.confinement.server import WorkerLimits, serve

if __name__ == "__main__":
    serve({}, WorkerLimits(), checks_evaluation=False)
