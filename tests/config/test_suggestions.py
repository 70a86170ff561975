"""Which key is suggested in place of one that does not exist."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.config import resolved, validate
from smolrun.errors import ConfigError


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    return resolved(compose())


def problem_with(shipped: dict[str, Any], typed: str) -> str:
    """The one line about a key that is set to 1."""
    data = copy.deepcopy(shipped)
    *groups, key = typed.split(".")
    place = data
    for group in groups:
        place = place[group]
    place[key] = 1
    with pytest.raises(ConfigError) as error:
        validate(data)
    (line,) = error.value.problems
    return line


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.stepz", "training.steps"),
        ("training.lr", "optimizer.lr"),
        ("steps", "training.steps"),
        ("algoritm", "algorithm"),
        ("model.widht", "model.width"),
        ("algorithm.bucket_mbs", "algorithm.bucket_mb"),
        ("training.bucket_mb", "algorithm.bucket_mb"),
        ("training.speed", "cluster.hosts[].speed"),
    ],
)
def test_an_unknown_key_is_told_with_the_one_meant(shipped: dict[str, Any], key: str, meant: str):
    line = problem_with(shipped, key)
    assert line.startswith(f"{key} = 1: no such key; allowed: ")
    assert line.endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("algorithm.stage", "algorithm=fsdp"),
        ("algorithm.server_trains", "algorithm=syncps, edp"),
        ("optimizer.momentum", "optimizer=sgd"),
        ("tracker.project", "tracker=wandb"),
    ],
)
def test_a_key_of_another_choice_is_told_with_it(shipped: dict[str, Any], key: str, choices: str):
    line = problem_with(shipped, key)
    name = key.partition(".")[2]
    assert ": no such key; allowed: " in line
    assert line.endswith(f"; {name} is a key of {choices}")


@pytest.mark.parametrize("key", ["training.polyak", "algorithm.nam", "model.targets"])
def test_no_key_is_suggested_that_would_not_do(shipped: dict[str, Any], key: str):
    """One of a choice that is not taken, or the one that says what is chosen."""
    line = problem_with(shipped, key)
    assert "did you mean" not in line
