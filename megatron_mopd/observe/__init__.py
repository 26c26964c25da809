"""What a run shows and leaves behind: metrics, progress on the terminal, and pictures."""
