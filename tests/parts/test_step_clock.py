"""A rank that plays a slower machine takes as much longer as its share is smaller, waits aside."""

from __future__ import annotations

import time

import pytest

from smolrun.parts.step_clock import FULL_SPEED, EmulatedPace


class Machine:
    """Three clocks that only work, waiting and sleep move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.used = self.waited = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(time, "thread_time", lambda: self.used)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.wall += seconds

    def compute(self, seconds: float, *, robbed: float = 0.0) -> None:
        self.used += seconds
        self.wall += seconds + robbed

    def wait(self, seconds: float) -> None:
        self.wall += seconds
        self.waited += seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_a_quarter_of_the_speed_is_four_times_the_time(machine: Machine) -> None:
    pace = EmulatedPace(0.25)
    pace.begin(machine.waited)
    machine.compute(1.0)
    pace.end(machine.waited)
    assert machine.wall == pytest.approx(4.0) and pace.late == 0.0


def test_what_leaves_early_leaves_as_much_later_and_nothing_counts_twice(machine: Machine) -> None:
    pace = EmulatedPace(0.5)
    pace.begin(machine.waited)
    machine.compute(1.0)
    pace.rest(machine.waited)
    assert machine.wall == pytest.approx(2.0)
    machine.compute(0.5)
    pace.end(machine.waited)
    assert machine.wall == pytest.approx(3.0)


def test_waiting_for_others_is_no_computing(machine: Machine) -> None:
    machine.waited = 7.0  # in earlier steps
    pace = EmulatedPace(0.5)
    pace.begin(machine.waited)
    machine.compute(1.0)
    machine.wait(10.0)
    pace.end(machine.waited)
    assert machine.wall == pytest.approx(12.0)


def test_a_stolen_core_is_made_up_for_and_told_where_it_cannot_be(machine: Machine) -> None:
    pace = EmulatedPace(0.5)
    pace.begin(machine.waited)
    machine.compute(1.0, robbed=0.5)
    pace.end(machine.waited)
    assert machine.wall == pytest.approx(2.0) and pace.late == 0.0
    pace.begin(machine.waited)
    machine.compute(1.0, robbed=2.0)
    pace.end(machine.waited)
    assert machine.wall == pytest.approx(5.0)
    assert pace.late == pytest.approx(1.0 / 4.0)


def straggles(machine: Machine, seed: str) -> list[float]:
    """How long 500 steps of a second took."""
    pace = EmulatedPace(0.5, straggler_chance=0.2, straggler_factor=3.0, seed=seed)
    taken = []
    for _ in range(500):
        began = machine.wall
        pace.begin(machine.waited)
        machine.compute(0.4)
        pace.rest(machine.waited)  # what leaves early is as late as the rest
        assert machine.wall - began == pytest.approx(0.8) or machine.wall - began > 2.3
        machine.compute(0.6)
        pace.end(machine.waited)
        taken.append(round(machine.wall - began, 6))
    assert pace.late == 0.0
    return taken


def test_a_straggler_is_slow_by_its_chance_and_the_seed_says_when(machine: Machine) -> None:
    taken = straggles(machine, "0 1")
    assert set(taken) == {2.0, 6.0}
    assert 70 < taken.count(6.0) < 130
    assert straggles(machine, "0 1") == taken != straggles(machine, "0 2")


def test_full_speed_never_sleeps(machine: Machine) -> None:
    FULL_SPEED.begin(0.0)
    FULL_SPEED.rest(0.0)
    FULL_SPEED.end(0.0)
    assert machine.wall == 0.0 and FULL_SPEED.late == 0.0
