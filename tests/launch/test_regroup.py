"""The driver's decisions where all ranks are linked and the run continues without lost ones: who
listens for which generation, who gets which roster, who is taken for lost. Without processes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smolrun.launch.control import RosterPeer
from smolrun.launch.elastic_worker import Elasticity
from smolrun.launch.regroup import RegroupSupervisor
from smolrun.launch.supervisor import Limits, RunPhase
from smolrun.launch.supervisor_events import (
    Action,
    Exited,
    Kill,
    PeerReported,
    Regrouped,
    RestartWorker,
    SendRegroup,
    SendRoster,
    WorkerReady,
)
from tests.launch.test_elastic import told
from tests.launch.test_supervisor import LIMITS, at, failed, outcome_of, states

POLICY = Elasticity(min_ranks=1, links="group")


def starting(count: int, policy: Elasticity = POLICY) -> RegroupSupervisor:
    return RegroupSupervisor(states(count), now=0.0, limits=LIMITS, policy=policy)


def ready(rank: int, generation: int | None = None) -> WorkerReady:
    """It listens on another port in every generation."""
    return WorkerReady(rank, at(5000 + rank + 10 * (generation or 0)), {}, generation)


def running(count: int, policy: Elasticity = POLICY) -> RegroupSupervisor:
    supervisor = starting(count, policy)
    for rank in range(count):
        supervisor.handle(ready(rank), 1.0)
    assert supervisor.phase is RunPhase.RUNNING
    return supervisor


def rosters(ports: dict[int, int], generation: int) -> list[Action]:
    """Of these ranks, to each of them; and the news for the task."""
    peers = [RosterPeer(rank, f"host{rank}", at(port)) for rank, port in ports.items()]
    sent: list[Action] = [SendRoster(peers, rank, generation) for rank in ports]
    return [*sent, Regrouped([*ports], generation)]


def without_notes(actions: list[Action]) -> list[Action]:
    kinds = (SendRoster, SendRegroup, Regrouped, Kill, RestartWorker)
    return [action for action in actions if isinstance(action, kinds)]


def test_the_first_generation_has_all_ranks() -> None:
    supervisor = starting(3)
    assert supervisor.handle(ready(2), 1.0) == []
    assert supervisor.handle(ready(0), 1.1) == []
    assert supervisor.handle(ready(1), 1.2) == rosters({0: 5000, 1: 5001, 2: 5002}, 0)
    assert supervisor.deadline is None


def test_survivors_are_linked_anew_and_the_lost_rank_is_added_when_it_is_back() -> None:
    supervisor = running(3)
    actions = supervisor.handle(Exited(1, -9), 10.0)
    assert without_notes(actions) == [SendRegroup(0, 1), SendRegroup(2, 1)]
    (line,) = told(actions)
    assert "the run continues with 2 of 3 ranks; rank 1 is started again" in line
    assert supervisor.handle(ready(2, 1), 10.1) == []
    assert supervisor.handle(ready(0, 1), 10.2) == rosters({0: 5010, 2: 5012}, 1)
    assert supervisor.advance(11.0) == [RestartWorker(1)]
    actions = supervisor.handle(ready(1), 15.0)
    assert actions == [SendRegroup(0, 2), SendRegroup(2, 2)]
    supervisor.handle(ready(0, 2), 15.1)
    actions = supervisor.handle(ready(2, 2), 15.2)
    # Its process is new, and listens since it began.
    assert without_notes(actions) == rosters({0: 5020, 1: 5001, 2: 5022}, 2)
    assert told(actions) == ["rank 1 on host1 is back after 5 s; 3 of 3 ranks are at work"]


def waiting_to_join(may_join: list[bool], limits: Limits = LIMITS) -> RegroupSupervisor:
    """Ranks 0 and 2 of three are linked, and rank 1 has been back since 15 s."""
    supervisor = RegroupSupervisor(
        states(3), now=0.0, limits=limits, policy=POLICY, may_join=lambda: may_join[0]
    )
    for rank in range(3):
        supervisor.handle(ready(rank), 1.0)
    supervisor.handle(Exited(1, -9), 10.0)
    supervisor.handle(ready(0, 1), 10.1)
    supervisor.handle(ready(2, 1), 10.1)
    assert supervisor.advance(11.0) == [RestartWorker(1)]
    actions = supervisor.handle(ready(1), 15.0)
    assert without_notes(actions) == []
    (line,) = told(actions)
    wait_s = min(POLICY.join_wait_s, limits.start_s)
    assert line == (
        "rank 1 on host1 can join again; that waits until the others can pause, "
        f"{wait_s:g} s at most"
    )
    assert supervisor.deadline == 15.0 + wait_s
    assert supervisor.advance(16.0) == []
    return supervisor


def test_a_rank_that_is_back_joins_once_the_others_can_pause() -> None:
    may_join = [False]
    supervisor = waiting_to_join(may_join)
    may_join[0] = True
    assert supervisor.advance(20.1) == [SendRegroup(0, 2), SendRegroup(2, 2)]
    supervisor.handle(ready(0, 2), 20.2)
    actions = supervisor.handle(ready(2, 2), 20.3)
    assert without_notes(actions) == rosters({0: 5020, 1: 5001, 2: 5022}, 2)


@pytest.mark.parametrize("start_s", [LIMITS.start_s, 5.0])
def test_a_rank_that_is_back_does_not_wait_for_ever(start_s: float) -> None:
    """Nor longer than its worker waits."""
    supervisor = waiting_to_join([False], replace(LIMITS, start_s=start_s))
    assert supervisor.deadline is not None
    assert supervisor.advance(supervisor.deadline - 0.1) == []
    assert without_notes(supervisor.advance(supervisor.deadline)) == [
        SendRegroup(0, 2),
        SendRegroup(2, 2),
    ]


def test_a_rank_that_is_back_joins_with_the_next_loss() -> None:
    supervisor = waiting_to_join([False])
    actions = supervisor.handle(Exited(2, -9), 21.0)
    assert without_notes(actions) == [SendRegroup(0, 2)]
    actions = supervisor.handle(ready(0, 2), 21.1)
    assert without_notes(actions) == rosters({0: 5020, 1: 5001}, 2)


def test_a_rank_that_waits_to_join_and_ends_interrupts_nobody() -> None:
    supervisor = waiting_to_join([False])
    assert without_notes(supervisor.handle(Exited(1, -9), 21.0)) == []
    assert without_notes(supervisor.advance(25.0)) == [RestartWorker(1)]


def test_a_loss_while_a_generation_forms_begins_the_next_one() -> None:
    supervisor = running(4)
    supervisor.handle(Exited(1, -9), 10.0)
    supervisor.handle(ready(2, 1), 10.1)
    actions = supervisor.handle(Exited(3, -9), 10.2)
    assert without_notes(actions) == [SendRegroup(0, 2), SendRegroup(2, 2)]
    assert supervisor.handle(ready(0, 1), 10.3) == [], "an answer to what no longer holds"
    supervisor.handle(ready(2, 2), 10.4)
    assert supervisor.handle(ready(0, 2), 10.5) == rosters({0: 5020, 2: 5022}, 2)


def test_a_rank_that_others_lost_and_that_runs_still_is_ended() -> None:
    supervisor = running(3)
    assert supervisor.handle(PeerReported(0, 2, 0, "silent for 9 s"), 20.0) == []
    assert supervisor.handle(PeerReported(1, 2, 0, "silent for 9 s"), 20.1) == []
    assert supervisor.advance(20.4) == []
    assert supervisor.deadline == 20.0 + LIMITS.settle_s
    assert supervisor.advance(20.5) == [Kill(2), SendRegroup(0, 1), SendRegroup(1, 1)]
    (line,) = told(supervisor.handle(Exited(2, -9), 20.6))
    assert line.startswith("rank 2 on host2 is lost: silent for 9 s; the run continues")


def test_the_end_of_a_process_explains_reports_about_it_and_kills_nobody() -> None:
    supervisor = running(3)
    supervisor.handle(PeerReported(0, 2, 0, "it hung up"), 20.0)
    supervisor.handle(PeerReported(1, 0, 0, "it hung up"), 20.1)  # 0 left the mesh
    actions = supervisor.handle(Exited(2, -9), 20.2)
    assert without_notes(actions) == [SendRegroup(0, 1), SendRegroup(1, 1)]
    assert without_notes(supervisor.advance(25.0)) == [RestartWorker(2)]


@pytest.mark.parametrize(
    ("reports", "lost"),
    [
        # Each has lost the other; rank 0 is needed.
        ([(0, 1, None), (1, 0, None)], 1),
        ([(2, 1, None), (1, 2, None), (0, 1, 2)], 1),
        # Rank 2 saw it; the others know it from there.
        ([(2, 1, None), (0, 1, 2)], 1),
        # Rank 1 reports a rank that only left because it had lost rank 2.
        ([(0, 2, None), (1, 0, None)], 2),
    ],
)
def test_whom_reports_mean(reports: list[tuple[int, int, int | None]], lost: int) -> None:
    supervisor = running(3)
    for reporter, peer, reported_by in reports:
        supervisor.handle(PeerReported(reporter, peer, 0, "silent", reported_by), 20.0)
    kills = [action for action in supervisor.advance(22.5) if isinstance(action, Kill)]
    assert kills == [Kill(lost)]


def test_reports_of_an_earlier_generation_mean_nothing() -> None:
    supervisor = running(3)
    supervisor.handle(Exited(1, -9), 10.0)
    supervisor.handle(ready(0, 1), 10.1)
    supervisor.handle(ready(2, 1), 10.1)
    supervisor.handle(PeerReported(0, 2, 0, "it hung up"), 10.2)
    assert not any(isinstance(action, Kill) for action in supervisor.advance(60.0))


def test_the_run_ends_with_rank_0() -> None:
    supervisor = running(3)
    actions = supervisor.handle(Exited(0, -9), 10.0)
    actions += [a for rank in (1, 2) for a in supervisor.handle(Exited(rank, -9), 10.1)]
    outcome = outcome_of(actions)
    assert (outcome.status, outcome.failed_rank) == ("failed", 0)


def test_rank_0_that_others_lost_is_the_end_too() -> None:
    supervisor = running(2)
    supervisor.handle(PeerReported(1, 0, 0, "silent for 9 s"), 20.0)
    supervisor.advance(22.5)
    assert supervisor.phase is RunPhase.CLOSING


def test_a_rank_that_fails_at_the_beginning_ends_the_run() -> None:
    supervisor = starting(3)
    supervisor.handle(ready(0), 1.0)
    supervisor.handle(failed(2, "ConfigError", "no such folder"), 1.1)
    assert supervisor.phase is RunPhase.CLOSING


def test_a_rank_that_can_never_be_linked_is_given_up() -> None:
    """A link that is broken costs a pause with each attempt, so there are only some."""
    supervisor, now, generation = running(3), 20.0, 0
    actions = supervisor.handle(Exited(2, -9), now)
    for _ in range(POLICY.max_quick):
        generation += 1
        for rank in (0, 1):
            supervisor.handle(ready(rank, generation), now)
        now += 60.0
        assert RestartWorker(2) in supervisor.advance(now)
        generation += 1
        for item in (ready(2), ready(0, generation), ready(1, generation)):
            supervisor.handle(item, now)
        supervisor.handle(PeerReported(0, 2, generation, "no link"), now + 30.0)
        supervisor.handle(PeerReported(1, 2, generation, "no link"), now + 30.0)
        assert Kill(2) in supervisor.advance(now + 33.0)
        actions = supervisor.handle(Exited(2, -9), now + 33.1)
    assert "it is not started again" in told(actions)[0]
    assert supervisor.phase is RunPhase.RUNNING
