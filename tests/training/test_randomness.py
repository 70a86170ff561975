"""Random generators go on where they stood."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy
import pytest
import torch

from smolrun.errors import CheckpointError
from smolrun.training.randomness import random_state, restore_random_state, seed_everything

CPU = torch.device("cpu")


def draw() -> list[Any]:
    normal = numpy.random.standard_normal(3).tolist()
    return [random.random(), random.gauss(0, 1), *normal, *torch.randn(3).tolist()]


def test_the_same_numbers_come_again_even_through_json() -> None:
    seed_everything(1, 2, 3)
    draw()
    state = json.loads(json.dumps(random_state(CPU)))
    first = draw()
    draw()
    restore_random_state(state, CPU)
    assert draw() == first


def test_seeds_of_ranks_and_steps_differ() -> None:
    seen = []
    for words in ((0, 0, 1), (0, 1, 1), (0, 0, 2), (1, 0, 1)):
        seed_everything(*words)
        seen.append(tuple(draw()))
    assert len(set(seen)) == 4


@pytest.mark.parametrize("damage", [{}, {"python": [3]}, {"torch": "!!"}, {"torch": "AAAA"}])
def test_a_damaged_state_is_an_error_with_a_sentence(damage: dict[str, Any]) -> None:
    state = random_state(CPU) | damage if damage else {}
    with pytest.raises(CheckpointError, match="random state"):
        restore_random_state(state, CPU)
