"""How an elastic run ends, without processes: by rank 0's result, by Ctrl-C, by what breaks it."""

from __future__ import annotations

import pytest

from smolrun.launch.control import ErrorReport, ResultMessage
from smolrun.launch.supervisor import RunPhase
from smolrun.launch.supervisor_events import (
    DriverFailed,
    Exited,
    Interrupted,
    Kill,
    SendStop,
    WorkerFinished,
)
from tests.launch.test_elastic import running, starting, told
from tests.launch.test_supervisor import bury, done, outcome_of


def test_one_that_is_done_early_is_left_in_peace() -> None:
    supervisor = running(3)
    assert supervisor.handle(done(1), 5.0) == []
    assert supervisor.handle(Exited(1, 0), 5.1) == []
    assert supervisor.advance(500.0) == []
    assert supervisor.phase is RunPhase.RUNNING


def test_who_is_late_at_the_end_is_ended() -> None:
    """One is frozen, one is just being started again; the run is done all the same."""
    supervisor = running(3)
    supervisor.handle(Exited(1, -9), 20.0)
    supervisor.advance(21.0)
    assert supervisor.handle(done(0), 22.0) == []
    assert supervisor.deadline == 37.0
    actions = supervisor.advance(37.0)
    assert actions == [Kill(1), Kill(2)]
    supervisor.handle(Exited(0, 0), 37.1)
    outcome = bury(supervisor, actions, 37.2)
    assert outcome.status == "done"
    assert outcome.departures[0]["away_s"] is None


def test_nobody_is_started_again_once_rank_0_is_done() -> None:
    supervisor = running(3)
    supervisor.handle(Exited(1, -9), 20.0)
    supervisor.handle(done(0), 20.5)
    assert supervisor.advance(21.5) == []
    supervisor.handle(Exited(2, -9), 22.0)
    outcome = outcome_of(supervisor.handle(Exited(0, 0), 22.1))
    assert outcome.status == "done"


def test_ctrl_c_stops_all_and_starts_nobody_again() -> None:
    supervisor = running(4)
    supervisor.handle(Exited(3, -9), 20.0)
    actions = supervisor.handle(Interrupted(), 20.5)
    assert actions == [SendStop(0), SendStop(1), SendStop(2)]
    assert told(supervisor.handle(Exited(2, -9), 21.0)) == []
    assert supervisor.advance(25.0) == []
    for rank in (0, 1):
        supervisor.handle(WorkerFinished(rank, ResultMessage(status="stopped")), 26.0)
    supervisor.handle(Exited(1, 0), 26.1)
    outcome = outcome_of(supervisor.handle(Exited(0, 0), 26.2))
    assert (outcome.status, outcome.exit_code) == ("stopped", 130)
    assert [row["rank"] for row in outcome.departures] == [3, 2]


def test_a_stop_that_takes_too_long_names_rank_0() -> None:
    supervisor = running(2)
    supervisor.handle(Interrupted(), 20.0)
    actions = supervisor.advance(80.0)
    assert actions == [Kill(0), Kill(1)]
    outcome = bury(supervisor, actions, 80.1)
    assert outcome.exit_code == 131
    assert "rank 0 on host0 did not stop within 60 s" in outcome.reason


@pytest.mark.parametrize("first", [[], [Exited(1, -9)]])
def test_ctrl_c_twice_ends_all_at_once(first: list[Exited]) -> None:
    supervisor = running(3)
    for item in first:
        supervisor.handle(item, 19.0)
    supervisor.handle(Interrupted(), 20.0)
    actions = supervisor.handle(Interrupted(), 20.1)
    assert [action for action in actions if isinstance(action, Kill)]
    assert bury(supervisor, actions, 20.2).exit_code == 131


def test_ctrl_c_before_anything_was_done() -> None:
    supervisor = starting(2)
    outcome = bury(supervisor, supervisor.handle(Interrupted(), 1.0), 1.1)
    assert outcome.reason == "stopped by the user before training began"


def test_a_reader_that_fails_ends_the_run() -> None:
    supervisor = running(2)
    outcome = bury(supervisor, supervisor.handle(DriverFailed("the disk is gone"), 2.0), 2.1)
    assert (outcome.status, outcome.failed_rank) == ("failed", None)


def test_a_worker_that_lost_rank_0_is_no_reason_to_give_it_up() -> None:
    supervisor = running(2)
    report = ErrorReport("PeerLost", "lost rank 0: silent for 9 s", 0)
    assert supervisor.handle(
        WorkerFinished(1, ResultMessage(status="failed", error=report)), 30.0
    ) == [Kill(1)]
    (line,) = told(supervisor.handle(Exited(1, 3), 30.1))
    assert "lost rank 0: silent for 9 s" in line
    assert supervisor._elastic[1].quick == 0
