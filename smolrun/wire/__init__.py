"""Floor 1: bytes <-> frames. Pure code that knows nothing of sockets, threads or clocks (sans-IO)."""
