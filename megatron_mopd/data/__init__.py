"""Tokenizer, prompts, domains and verifiers, and the batching of trajectories into micro-batches."""
