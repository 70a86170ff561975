"""All random generators follow from the words they are seeded with."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

from smolrun.training.randomness import seed_everything

CPU = torch.device("cpu")


def draw() -> list[Any]:
    normal = numpy.random.standard_normal(3).tolist()
    return [random.random(), random.gauss(0, 1), *normal, *torch.randn(3).tolist()]


def test_equal_words_give_equal_draws_in_every_library() -> None:
    seed_everything(CPU, 1, 2, 3)
    first = draw()
    draw()
    seed_everything(CPU, 1, 2, 3)
    assert draw() == first


def test_other_words_give_other_draws_in_every_library() -> None:
    seen = []
    for words in ((0, 0, 1), (0, 1, 1), (0, 0, 2), (1, 0, 1), (2**63 - 1, 0, 10**12)):
        seed_everything(CPU, *words)
        seen.append(draw())
    assert all(len(set(numbers)) == len(seen) for numbers in zip(*seen, strict=True))
