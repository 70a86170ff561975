"""What the configuration says about who waits for whom, and who trains."""

from __future__ import annotations

import pytest

from smolrun.cli.compose import compose
from smolrun.config import ranks
from smolrun.driver import fleet
from smolrun.driver.roles import tell_roles, waits_for_all


@pytest.mark.parametrize(
    ("overrides", "is_waiting"),
    [
        (["algorithm=classicdp"], True),
        (["algorithm=syncps"], True),
        (["algorithm=syncps", "algorithm.straggler_s=1"], False),
        (["algorithm=edp"], False),
    ],
    ids=["classicdp", "syncps", "syncps that leaves stragglers", "edp"],
)
def test_who_waits_for_the_slowest(overrides: list[str], is_waiting: bool) -> None:
    assert waits_for_all(compose([*overrides, "cluster.ranks=2"])) is is_waiting


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["algorithm=edp", "cluster.ranks=2"], True),
        (["algorithm=edp", "cluster.ranks=2", "algorithm.server_trains=true"], False),
        (["algorithm=syncps", "cluster.ranks=2", "algorithm.server_trains=false"], True),
        (["algorithm=syncps", "cluster.ranks=2"], False),
        (["algorithm=classicdp", "cluster.ranks=2"], False),
    ],
)
def test_a_server_that_does_not_train_is_told(overrides: list[str], told: bool) -> None:
    line = "rank 0 on local serves and does not train (algorithm.server_trains=false)"
    assert list(tell_roles(compose(overrides))) == [line] * told


@pytest.mark.parametrize(
    ("overrides", "threads"),
    [
        (["cluster.ranks=2"], [4, 4]),
        (["cluster.ranks=3"], [2, 2, 2]),
        (["cluster.hosts=[{name: a, ranks: 2}, {name: b, ranks: 2}]"], [2, 2, 2, 2]),
        (["cluster.ranks=16"], [1] * 16),
        (["cluster.ranks=2", "cluster.threads=7"], [7, 7]),
    ],
)
def test_ranks_of_one_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], threads: list[int]
) -> None:
    """Also where they are of several hosts without `ssh`."""
    monkeypatch.setattr(fleet, "_own_cores", lambda: 8)
    config = compose(overrides)
    assert [fleet.Fleet(config, {}).threads(rank) for rank in ranks(config)] == threads
