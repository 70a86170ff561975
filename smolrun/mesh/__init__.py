"""Moves tensors between ranks over TCP and detects lost peers; the only layer with sockets."""
