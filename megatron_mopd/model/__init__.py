"""From configuration to GPTModel stages: student or frozen teacher, attention, hidden states, checkpoints."""
