"""What the configuration says about who waits for whom, and who trains."""

from __future__ import annotations

import pytest

from smolrun.cli.compose import compose
from smolrun.tasks.roles import waits_for_all


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
