"""Makes a host ready for runs: what is there, what has to be done, doing it."""
