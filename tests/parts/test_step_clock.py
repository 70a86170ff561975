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


def test_full_speed_never_sleeps(machine: Machine) -> None:
    FULL_SPEED.begin(0.0)
    FULL_SPEED.rest(0.0)
    FULL_SPEED.end(0.0)
    assert machine.wall == 0.0 and FULL_SPEED.late == 0.0
