"""Random draws of models (dropout, noise, stochastic depth, augmentation): seeded before every
micro-batch from the run's seed and the position of its samples.

    rank 0   seed(42, 0) forward, backward   seed(42, 4) forward, backward
    rank 1   seed(42, 8) forward, backward   seed(42, 12) ...      (seed, position of first sample)

So ranks draw different numbers, as they have different samples; a run that is cut into equal
micro-batches draws the same on any number of ranks; and a resumed run needs no state of any
generator. Which words are used when: algorithms/base.py.

Source: the idea is that of counter-based generators, Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import random

import numpy
import torch


def seed_everything(device: torch.device, *words: int) -> None:
    """Seeds the generators of Python, numpy, torch and `device` from some numbers >= 0."""
    sequence = numpy.random.SeedSequence(words)
    first, second, third = (int(word) for word in sequence.generate_state(3))
    random.seed(first)
    numpy.random.seed(second)
    # Not torch.manual_seed: where an accelerator is not in use yet, it formats a traceback for
    # each kind of them, 0.1 ms a call.
    torch.default_generator.manual_seed(third)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(third)
    elif device.type == "mps":
        torch.mps.manual_seed(third)
