"""Checkpoints on a disk: files of tensors, and a manifest that makes them one whole.

Knows nothing of algorithms, ranks' meshes or configuration: whoever saves says which range of which
named tensor it holds, whoever loads asks for ranges by name.
"""
