"""The collectives of torch.distributed: each is a schedule, as data, run by one executor."""
