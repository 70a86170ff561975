"""Floor 4: what algorithms share: who holds what, gradients in buckets, precision, replicas that
agree."""
