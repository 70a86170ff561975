"""A machine elsewhere: commands, small programs and workers on it, over a connection."""
