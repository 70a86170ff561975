"""Comparisons alternate, and a machine that slows down while they run does not move the ratio."""

from __future__ import annotations

import time

import pytest

from smolrun.benchmarks.compare import compare


class Machine:
    """A clock that only work moves, on a machine that gets slower and slower."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slowness = 1.0
        self.order: list[str] = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "process_time", lambda: self.now / 2)

    def work(self, name: str, seconds: float) -> None:
        self.order.append(name)
        self.now += seconds * self.slowness
        self.slowness *= 1.02


def test_the_ratio_survives_a_machine_that_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    met: list[int] = []
    result = compare(
        lambda: machine.work("ours", 1.0),
        lambda: machine.work("peer", 2.0),
        repeats=6,
        calls=1,
        meet=lambda: met.append(1),
    )
    assert result.ratio == pytest.approx(0.5, rel=0.03)
    assert result.spread[0] <= result.ratio <= result.spread[1]
    assert len(met) == 12, "all ranks meet before every measurement"
    assert machine.order[2:6] == ["ours", "peer", "peer", "ours"]
    row = result.row("b", "op", "p", bytes=4)
    assert row["ratio"] == result.ratio
    assert row["cpu_ratio"] == pytest.approx(0.5, rel=0.1)
    assert (row["bench"], row["peer"], row["repeats"]) == ("b", "p", 6)


def test_time_is_per_call_and_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    calls = {"ours": 0}

    def ours() -> None:
        calls["ours"] += 1
        machine.now += 100.0 if calls["ours"] <= 2 else 3.0

    def peer() -> None:
        machine.now += 3.0

    result = compare(ours, peer, repeats=3, calls=5, meet=lambda: None, warm_up=2)
    assert result.ours_s == result.peer_s == pytest.approx(3.0)
