"""The driver's decisions, as a pure state machine: no process is started here."""

from __future__ import annotations

import pytest

from smolrun.events import Note, RankStep, StepDone
from smolrun.launch.control import Address, ErrorReport, ResultMessage, RosterPeer
from smolrun.launch.root_cause import RankState
from smolrun.launch.supervisor import Limits, RunPhase, Supervisor
from smolrun.launch.supervisor_events import (
    Action,
    Exited,
    Finish,
    Input,
    Interrupted,
    Kill,
    NotStarted,
    ProtocolViolation,
    Reported,
    RunOutcome,
    SendRoster,
    SendStop,
    WorkerFinished,
    WorkerReady,
)

LIMITS = Limits(start_s=120, finish_s=300, stop_s=60, grace_s=2, exit_s=5, kill_s=5)


def at(port: int) -> list[Address]:
    return [Address("127.0.0.1", port)]


def states(count: int) -> list[RankState]:
    return [RankState(r, f"host{r}", f"logs/rank{r}-host{r}.log") for r in range(count)]


def starting(count: int) -> Supervisor:
    return Supervisor(states(count), now=0.0, limits=LIMITS)


def running(count: int) -> Supervisor:
    supervisor = starting(count)
    for rank in range(count):
        supervisor.handle(WorkerReady(rank, at(5000 + rank), {"python": "3.11"}), 1.0)
    assert supervisor.phase is RunPhase.RUNNING
    return supervisor


def training(count: int) -> Supervisor:
    supervisor = running(count)
    supervisor.handle(step(0, 0), 1.5)
    return supervisor


def step(rank: int, number: int) -> Reported:
    return Reported(rank, RankStep(number, rank, 0.1, 0.0, None, 0, 0))


def done(rank: int) -> WorkerFinished:
    return WorkerFinished(rank, ResultMessage(status="done", summary={"rank": rank}))


def failed(rank: int, kind: str, message: str, peer: int | None = None) -> WorkerFinished:
    return WorkerFinished(
        rank, ResultMessage(status="failed", error=ErrorReport(kind, message, peer))
    )


def outcome_of(actions: list[Action]) -> RunOutcome:
    (finish,) = [action for action in actions if isinstance(action, Finish)]
    assert actions[-1] is finish
    return finish.outcome


def bury(supervisor: Supervisor, actions: list[Action], now: float) -> RunOutcome:
    """Let every killed worker end, and give the outcome."""
    for rank in sorted({action.rank for action in actions if isinstance(action, Kill)}):
        actions = supervisor.handle(Exited(rank, -9), now) or actions
    return outcome_of(actions)


def test_the_roster_is_sent_once_all_are_ready() -> None:
    supervisor = starting(2)
    assert supervisor.handle(WorkerReady(1, at(5001)), 1.0) == []
    actions = supervisor.handle(WorkerReady(0, at(5000)), 2.0)
    expected = [RosterPeer(0, "host0", at(5000)), RosterPeer(1, "host1", at(5001))]
    assert actions == [SendRoster(expected)]
    assert supervisor.deadline is None


def test_a_run_that_goes_well() -> None:
    supervisor = running(2)
    supervisor.handle(Reported(0, StepDone(7, 1.0, 2.0, 1.0, 0.1, 8, 8.0, 0, 0, 0.1, 0.0)), 2.0)
    assert supervisor.handle(done(0), 3.0) == []
    assert supervisor.handle(done(1), 3.1) == []
    assert supervisor.handle(Exited(0, 0), 3.2) == []
    outcome = outcome_of(supervisor.handle(Exited(1, 0), 3.3))
    assert (outcome.status, outcome.exit_code, outcome.reason, outcome.steps) == ("done", 0, "", 8)
    assert outcome.summaries == {0: {"rank": 0}, 1: {"rank": 1}}
    assert outcome.versions == {"python": "3.11"}


def test_the_start_deadline_names_all_that_are_not_ready() -> None:
    supervisor = starting(3)
    supervisor.handle(WorkerReady(1, at(5001)), 1.0)
    assert supervisor.advance(119.9) == []
    actions = supervisor.advance(120.0)
    assert actions == [Kill(0), Kill(1), Kill(2)]
    outcome = bury(supervisor, actions, 120.1)
    assert outcome.exit_code == 3
    assert "rank 0 on host0, rank 2 on host2 not ready within 120 s" in outcome.reason
    assert (outcome.failed_rank, outcome.failed_host) == (0, "host0")


def test_a_killed_rank_is_named_with_its_signal_step_and_log() -> None:
    supervisor = running(4)
    supervisor.handle(step(2, 139), 2.0)
    supervisor.handle(failed(0, "PeerLost", "lost rank 2: it closed the link", 2), 3.0)
    supervisor.handle(Exited(2, -9), 3.1)
    supervisor.handle(failed(1, "PeerLost", "lost rank 2: it closed the link", 2), 3.1)
    actions = supervisor.handle(failed(3, "PeerLost", "lost rank 0: it closed the link", 0), 3.2)
    assert actions == []  # all have reported: they may leave on their own
    for rank in (0, 1):
        supervisor.handle(Exited(rank, 3), 3.3)
    outcome = outcome_of(supervisor.handle(Exited(3, 3), 3.4))
    assert outcome.exit_code == 3
    assert outcome.reason == (
        "rank 2 on host2 died from signal 9 (killed) at step 140; was its memory full?; "
        "3 other ranks ended with it; log: logs/rank2-host2.log"
    )


def test_an_own_error_beats_those_who_lost_somebody() -> None:
    supervisor = running(3)
    supervisor.handle(failed(0, "PeerLost", "lost rank 1: gone", 1), 3.0)
    supervisor.handle(failed(1, "ValueError", "shapes do not fit"), 3.1)
    assert supervisor.advance(5.0) == [Kill(2)]
    for rank in (0, 1):
        supervisor.handle(Exited(rank, 3), 5.1)
    assert outcome_of(supervisor.handle(Exited(2, -9), 5.2)).failed_rank == 1


def test_the_error_is_shown_on_one_line() -> None:
    supervisor = running(1)
    supervisor.handle(failed(0, "ValueError", "shapes\n  do not fit"), 3.1)
    outcome = outcome_of(supervisor.handle(Exited(0, 3), 3.2))
    expected = "rank 0 on host0 failed before its first step: ValueError: shapes do not fit; log: "
    assert outcome.reason == expected + "logs/rank0-host0.log"


def test_a_frozen_rank_is_named_by_the_others_and_killed() -> None:
    supervisor = running(3)
    supervisor.handle(step(1, 11), 2.0)
    supervisor.handle(failed(0, "PeerLost", "lost rank 1: silent for 10 s", 1), 12.0)
    assert supervisor.handle(failed(2, "PeerLost", "lost rank 1: silent for 10 s", 1), 12.1) == []
    assert supervisor.advance(12.5) == [], "an exit of rank 1 may still come and tell more"
    actions = supervisor.advance(12.6)
    assert actions == [Kill(1)], "nobody else has anything to add, so the grace ends early"
    supervisor.handle(Exited(0, 3), 12.7)
    supervisor.handle(Exited(2, 3), 12.7)
    outcome = outcome_of(supervisor.handle(Exited(1, -9), 12.8))
    assert (outcome.failed_rank, outcome.exit_code) == (1, 3)
    assert "rank 1 on host1 stopped answering at step 12 (silent for 10 s)" in outcome.reason


def test_the_grace_ends_at_once_when_all_have_reported() -> None:
    supervisor = running(2)
    supervisor.handle(failed(0, "TrainingError", "loss is no number"), 2.0)
    assert supervisor.deadline == 4.0
    supervisor.handle(failed(1, "PeerLost", "lost rank 0: closed", 0), 2.1)
    assert supervisor.phase is RunPhase.CLOSING


def test_whoever_keeps_silent_after_a_failure_is_killed_after_the_grace() -> None:
    supervisor = running(2)
    supervisor.handle(Exited(0, 7), 2.0)
    assert supervisor.advance(3.9) == []
    actions = supervisor.advance(4.0)
    assert actions == [Kill(1)]
    assert "died with exit code 7" in bury(supervisor, actions, 4.1).reason


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (
            ProtocolViolation(1, "sent a line that is no message"),
            "broke the control protocol: it sent",
        ),
        (NotStarted(1, "No such file: python9"), "could not be started: No such file: python9"),
        (Exited(1, 1), "died with exit code 1 while it started"),
        (Exited(1, 0), "ended without a result while it started"),
        (WorkerFinished(1, ResultMessage(status="done")), "reported its end before the run began"),
    ],
)
def test_a_failure_during_the_start_ends_all_at_once(problem: Input, words: str) -> None:
    supervisor = starting(2)
    actions = supervisor.handle(problem, 1.0)
    assert Kill(0) in actions
    assert supervisor.phase is RunPhase.CLOSING
    actions += [Kill(1)]  # one with a result may leave on its own, and does; the others are killed
    outcome = bury(supervisor, actions, 1.1)
    assert (outcome.exit_code, outcome.failed_rank) == (3, 1)
    assert words in outcome.reason


def test_the_first_ctrl_c_stops_at_an_agreed_step() -> None:
    supervisor = training(2)
    assert supervisor.handle(Interrupted(), 2.0) == [SendStop(0), SendStop(1)]
    assert supervisor.advance(3.0) == []
    for rank in (0, 1):
        supervisor.handle(WorkerFinished(rank, ResultMessage(status="stopped")), 4.0)
    supervisor.handle(Exited(0, 0), 4.1)
    outcome = outcome_of(supervisor.handle(Exited(1, 0), 4.1))
    assert (outcome.status, outcome.exit_code) == ("stopped", 130)


def test_a_run_that_ends_before_the_stop_reaches_it_is_done() -> None:
    supervisor = training(1)
    supervisor.handle(Interrupted(), 2.0)
    supervisor.handle(done(0), 2.0)
    assert outcome_of(supervisor.handle(Exited(0, 0), 2.1)).exit_code == 0


def test_the_second_ctrl_c_ends_all_now() -> None:
    supervisor = training(2)
    supervisor.handle(Interrupted(), 2.0)
    actions = supervisor.handle(Interrupted(), 2.5)
    assert actions == [Kill(0), Kill(1)]
    outcome = bury(supervisor, actions, 2.6)
    assert (outcome.status, outcome.exit_code) == ("stopped", 131)


def test_a_rank_that_ignores_stop_is_killed_at_the_deadline() -> None:
    supervisor = training(2)
    supervisor.handle(Interrupted(), 2.0)
    supervisor.handle(WorkerFinished(0, ResultMessage(status="stopped")), 3.0)
    actions = supervisor.advance(62.0)
    assert actions == [Kill(0), Kill(1)]
    outcome = bury(supervisor, actions, 62.1)
    assert outcome.exit_code == 131
    assert "rank 1 on host1 did not stop within 60 s" in outcome.reason


def test_ctrl_c_before_training_began_ends_at_once() -> None:
    supervisor = starting(2)
    actions = supervisor.handle(Interrupted(), 1.0)
    assert actions == [Kill(0), Kill(1)]
    assert bury(supervisor, actions, 1.1).exit_code == 130


def test_ctrl_c_while_ranks_link_up_ends_at_once() -> None:
    supervisor = running(2)
    supervisor.handle(Reported(0, Note("info", "still linking")), 1.5)
    actions = supervisor.handle(Interrupted(), 2.0)
    assert actions == [Kill(0), Kill(1)]
    outcome = bury(supervisor, actions, 2.1)
    assert (outcome.exit_code, outcome.reason) == (130, "stopped by the user before training began")


def test_a_failure_while_stopping_is_a_failure() -> None:
    supervisor = training(2)
    supervisor.handle(Interrupted(), 2.0)
    supervisor.handle(Exited(1, -11), 2.1)
    outcome = bury(supervisor, supervisor.advance(4.1), 4.2)
    assert outcome.exit_code == 3
    assert "segmentation fault" in outcome.reason


def test_ctrl_c_during_the_grace_keeps_the_cause_and_hurries() -> None:
    supervisor = training(2)
    supervisor.handle(Exited(1, -9), 2.0)
    actions = supervisor.handle(Interrupted(), 2.1)
    assert actions == [Kill(0)]
    assert bury(supervisor, actions, 2.2).exit_code == 3


def test_ranks_that_never_finish_after_the_first_are_named() -> None:
    supervisor = running(3)
    supervisor.handle(done(0), 10.0)
    assert supervisor.deadline == 310.0
    assert supervisor.advance(310.0) == [Kill(1), Kill(2)]
    supervisor.handle(Exited(0, 0), 310.1)
    outcome = bury(supervisor, [Kill(1), Kill(2)], 310.2)
    assert "rank 1 on host1, rank 2 on host2 did not finish within 300 s" in outcome.reason


def test_a_rank_that_does_not_exit_after_its_result_is_killed_and_the_run_is_still_done() -> None:
    supervisor = running(1)
    assert supervisor.handle(done(0), 2.0) == []
    assert supervisor.advance(7.0) == [Kill(0)]
    assert outcome_of(supervisor.handle(Exited(0, -9), 7.1)).exit_code == 0


def test_a_kill_without_an_exit_does_not_hang_and_is_told() -> None:
    supervisor = running(1)
    supervisor.handle(Interrupted(), 2.0)
    supervisor.handle(Interrupted(), 2.5)
    outcome = outcome_of(supervisor.advance(7.5))
    assert "no sign of the end of rank 0 on host0" in outcome.reason
