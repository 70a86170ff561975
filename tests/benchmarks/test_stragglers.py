"""The event simulation with known cases, and the row of edp on real sockets."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from smolrun.benchmarks.stragglers import compare_edp, simulated_s, straggling
from smolrun.collectives.api import new_group
from smolrun.mesh.mesh import Mesh
from smolrun.testing import run_ranks
from smolrun.wire.frame import Tag
from smolrun.worker.bench import end_together
from tests.waiting import SOON_S


def test_without_staleness_every_step_lasts_as_long_as_its_slowest() -> None:
    assert simulated_s([[1, 5], [1, 1], [4, 1]], 0) == 5 + 1 + 4


def test_a_rank_that_was_slow_catches_up_within_the_bound() -> None:
    trace = [[1.0, 3.0], [1.0, 1.0], [3.0, 1.0], [1.0, 1.0]]
    assert [simulated_s(trace, bound) for bound in (0, 1, 2)] == [8.0, 7.0, 6.0]


def test_unbounded_is_the_slowest_ranks_own_sum() -> None:
    trace = straggling(ranks=4, steps=60, step_s=1.0, chance=0.2, factor=5.0, seed=3)
    assert simulated_s(trace, 60) == pytest.approx(max(map(sum, zip(*trace, strict=True))))


def test_more_staleness_never_costs_time_and_four_ranks_reach_the_known_bounds() -> None:
    trace = straggling(ranks=4, steps=20_000, step_s=1.0, chance=0.1, factor=5.0, seed=1)
    assert sum(max(row) == 5.0 for row in trace) == pytest.approx(2000, rel=0.1)
    best = [len(trace) / simulated_s(trace, bound) for bound in range(5)]
    assert best == sorted(best)
    assert best[0] == pytest.approx(1 / 1.4, abs=0.01)
    assert best[3] == pytest.approx(0.84, abs=0.01)


def measured(step_s: float, factor: float, kind: str = "tcp") -> list[dict[str, Any]]:
    def rank_main(mesh: Mesh) -> dict[str, Any]:
        row = compare_edp(
            mesh, steps=5, step_s=step_s, chance=2.0, factor=factor, repeats=2, wait_fraction=0.0
        )
        end_together(new_group(mesh))
        return row

    return run_ranks(3, rank_main, kind=kind)


def test_a_worker_that_leaves_first_does_not_end_the_bench() -> None:
    """Rank 1 leaves while rank 0, which still listens to it, waits for rank 2."""
    has_left = threading.Event()

    def rank_main(mesh: Mesh) -> bool:
        if mesh.rank == 0:
            mesh.recv(1, Tag(99, 0, 0), torch.empty(1))
            end_together(new_group(mesh))
        elif mesh.rank == 1:
            mesh.close()
            has_left.set()
        else:
            assert has_left.wait(SOON_S)
        return True

    assert run_ranks(3, rank_main, kind="tcp") == [True] * 3


def test_all_ranks_have_the_same_row_and_time_is_at_least_the_emulated_one() -> None:
    rows = measured(0.02, 1.0)
    row = rows[0]
    assert {one["ratio"] for one in rows} == {row["ratio"]}
    assert (row["op"], row["world_size"], row["paced"]) == ("edp, 2 workers", 3, True)
    assert row["peer_s"] == pytest.approx(0.02)
    assert row["ratio"] >= 1.0 and row["efficiency"] == pytest.approx(1 / row["ratio"])


def test_slow_work_items_count_as_computing() -> None:
    """With a chance of 2 in steps of two workers every work item is slow."""
    assert measured(0.01, 3.0)[0]["peer_s"] == pytest.approx(0.03)
