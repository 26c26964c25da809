"""The life of a run: set-up, checkpoints and resume, preemption, alarms, evaluation, records."""
