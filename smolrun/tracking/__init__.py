"""Readers of the events of a run, and the folder in which a run leaves its traces.

They know nothing of training, launching or configuration, and nothing they do can hurt a run: see
`Fanout`.
"""
