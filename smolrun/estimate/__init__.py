"""What a run would need, before it is started: memory, bytes, seconds, disk."""
