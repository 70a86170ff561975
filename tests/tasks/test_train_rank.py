"""What a rank builds from a configuration."""

from __future__ import annotations

from pathlib import Path

import torch

from smolrun.algorithms.base import FORWARD, Algorithm
from smolrun.cli.compose import compose
from smolrun.data.base import Prepared
from smolrun.tasks.train_rank import place_algorithm
from smolrun.testing import run_ranks
from smolrun.training.randomness import seed_everything

CPU = torch.device("cpu")


def place(*overrides: str) -> Algorithm:
    """The algorithm of a configuration for samples of 4 features and 3 classes, on one rank."""
    prepared = Prepared("features", "", "", 3, 4, None, None, 100, 10, "")
    config = compose(["algorithm=single", *overrides]).model_dump()
    (algorithm,) = run_ranks(1, lambda mesh: place_algorithm(config, prepared, mesh, CPU))
    return algorithm


def test_draws_follow_the_seed_of_the_run(tmp_path: Path) -> None:
    reseed = place("model=mlp", "data=digits", "seed=7").context.reseed
    reseed(FORWARD, 24)
    drawn = torch.rand(3)
    seed_everything(CPU, 7, FORWARD, 24)
    assert torch.equal(torch.rand(3), drawn)
