"""What is planned for each rank, and what is said of it at the start."""

from __future__ import annotations

import pytest

from smolrun.cli.compose import compose
from smolrun.config import ranks
from smolrun.driver import fleet
from smolrun.driver.preflight import start_notes


@pytest.mark.parametrize(
    ("overrides", "is_noted"),
    [
        (["algorithm=edp", "cluster.ranks=2"], True),
        (["algorithm=edp", "cluster.ranks=2", "algorithm.server_trains=true"], False),
        (["algorithm=syncps", "cluster.ranks=2", "algorithm.server_trains=false"], True),
        (["algorithm=syncps", "cluster.ranks=2"], False),
        (["algorithm=classicdp", "cluster.ranks=2"], False),
    ],
)
def test_a_dedicated_server_is_noted(overrides: list[str], is_noted: bool) -> None:
    line = "rank 0 on local is the parameter server (algorithm.server_trains=false)"
    assert list(start_notes(compose(overrides))) == [line] * is_noted


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
