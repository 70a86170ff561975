"""A rank's process: control channel, mesh, then the half of a task that runs on every rank."""
