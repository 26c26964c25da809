"""Builds GPTModel stages from a configuration (student or frozen teacher), and reads and writes
checkpoints."""
