"""Frozen domain experts: which one scores which sample, where their weights rest, what is kept of their
forward pass."""
