"""Sweeps: the jobs of `smolrun -m`, each a run in a process of its own, one after another."""
