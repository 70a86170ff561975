"""Links are measured in both directions, one at a time."""

from __future__ import annotations

from itertools import permutations

import pytest

from smolrun.benchmarks.link_speeds import measure_links
from smolrun.collectives.api import new_group
from smolrun.testing import run_ranks


@pytest.mark.parametrize("kind", ["memory", "tcp"])
def test_every_direction_is_measured_once_by_its_sender(kind: str):
    told = run_ranks(3, lambda mesh: measure_links(new_group(mesh)), kind=kind)
    for rank, rows in enumerate(told):
        assert all(row["from"] == rank for row in rows)
    rows = [row for one in told for row in one]
    assert sorted((row["from"], row["to"]) for row in rows) == list(permutations(range(3), 2))
    assert all(row["rtt_s"] > 0 and row["bytes_per_s"] > 0 for row in rows)


def test_one_rank_has_no_link():
    assert run_ranks(1, lambda mesh: measure_links(new_group(mesh))) == [[]]
