"""Floor 3: what torch.distributed calls collectives. Each algorithm is a schedule, plain data, run
by one executor."""
