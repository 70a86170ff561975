"""Layer 6: the training loop, its callbacks, loaders and optimizers."""
