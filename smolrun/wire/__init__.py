"""Floor 1: bytes <-> frames. Pure: it knows nothing of sockets, threads or clocks."""
