"""Bytes <-> frames. Sans-IO: knows nothing of sockets, threads or clocks."""
