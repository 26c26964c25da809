"""One optimizer step: its batch, scoring and learning, the update and what guards it."""
