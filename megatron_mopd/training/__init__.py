"""One optimizer step and what surrounds it: losses, optimizer, guards, evaluation, checkpoints of a run."""
