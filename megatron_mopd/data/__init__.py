"""Tokenizer, prompts, domains, verifiers, and the way trajectories become micro-batches."""
