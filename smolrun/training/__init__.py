"""Floor 6: the training loop and what belongs to it."""
