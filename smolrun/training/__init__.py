"""The training loop, its callbacks, loaders and optimizers."""
