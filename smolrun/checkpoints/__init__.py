"""Checkpoints on a disk: files of tensors, and a manifest that makes them one whole.

Knows nothing of algorithms, meshes or configuration: a writer gives ranges of named tensors, a
reader reads ranges by name.
"""
