"""The output of a run: metrics, progress on the terminal, and pictures."""
