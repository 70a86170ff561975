"""What edp refuses, before anything starts."""

from __future__ import annotations

import pytest

from smolrun.cli.compose import compose
from smolrun.config import savers
from smolrun.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["training.check_replicas=true"], "no two need be equal"),
        (["training.resync_every=4"], "resync_every = 4.*no two need be equal"),
        (["algorithm.pushes_per_batch=99"], "parts without samples"),
        (
            ["cluster.ranks=3", "algorithm.min_ranks=5"],
            "min_ranks = 5: the run has only 3 ranks; allowed: 1 to 3, or more cluster.ranks",
        ),
        (
            ["cluster.hosts=[{name: mini1}, {name: pi5}]", "algorithm.min_ranks=3"],
            "min_ranks = 3: the run has only 2 ranks; allowed: 1 to 2, or more ranks in",
        ),
        (["algorithm.damping=often"], "algorithm.damping = often"),
        (["data=hf", "data.path=a/b", "data.streaming=true"], "a stream is asked for rows ahead"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        compose(["algorithm=edp", *overrides])


def test_the_server_alone_saves() -> None:
    config = compose(["algorithm=edp", "cluster.ranks=4"])
    assert savers(config) == 1
    assert config.algorithm.min_ranks == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "overrides", [["cluster.ranks=1"], ["cluster.ranks=3", "algorithm.min_ranks=3"]]
)
def test_as_many_ranks_as_there_are_may_be_needed(overrides: list[str]) -> None:
    compose(["algorithm=edp", *overrides])
