"""The row of edp: paced workers on real sockets, whose time is computing and little else."""

from __future__ import annotations

from typing import Any

import pytest

from smolrun.benchmarks.never_waiting import compare_edp
from smolrun.mesh.mesh import Mesh
from smolrun.testing import run_ranks


def measured(step_s: float, factor: float) -> list[dict[str, Any]]:
    def rank_main(mesh: Mesh) -> dict[str, Any]:
        return compare_edp(
            mesh, steps=5, step_s=step_s, chance=2.0, factor=factor, repeats=2, wait_fraction=0.0
        )

    return run_ranks(3, rank_main, kind="tcp")


def test_all_ranks_tell_the_same_and_time_is_at_least_what_was_played() -> None:
    rows = measured(0.02, 1.0)
    row = rows[0]
    assert {one["ratio"] for one in rows} == {row["ratio"]}
    assert (row["op"], row["world_size"], row["paced"]) == ("edp, 2 workers", 3, True)
    assert row["peer_s"] == pytest.approx(0.02)
    assert row["ratio"] >= 1.0 and row["efficiency"] == pytest.approx(1 / row["ratio"])


def test_slow_tickets_count_as_computing() -> None:
    """With a chance of 2 in steps of two workers every ticket is slow."""
    assert measured(0.01, 3.0)[0]["peer_s"] == pytest.approx(0.03)
