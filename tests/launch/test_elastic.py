"""The driver's decisions in an elastic run, without processes: who is told what, who is started
again, and how it ends."""

from __future__ import annotations

from smolrun.events import Membership
from smolrun.launch.control import RosterPeer
from smolrun.launch.elastic import ElasticSupervisor
from smolrun.launch.elastic_worker import Elasticity
from smolrun.launch.root_cause import RankState
from smolrun.launch.supervisor import RunPhase
from smolrun.launch.supervisor_events import (
    Action,
    Answering,
    Exited,
    Kill,
    Notify,
    NotStarted,
    ProtocolViolation,
    Reported,
    RestartWorker,
    SendRoster,
    WorkerReady,
)
from tests.launch.test_supervisor import (
    LIMITS,
    at,
    bury,
    done,
    failed,
    outcome_of,
    states,
    step,
)

POLICY = Elasticity(min_ranks=2, wait_s=60)


def starting(count: int, policy: Elasticity = POLICY) -> ElasticSupervisor:
    return ElasticSupervisor(states(count), now=0.0, limits=LIMITS, policy=policy)


def running(count: int, policy: Elasticity = POLICY) -> ElasticSupervisor:
    supervisor = starting(count, policy)
    for rank in range(count):
        supervisor.handle(WorkerReady(rank, at(5000 + rank), {"python": "3.11"}), 1.0)
    supervisor.handle(step(0, 0), 1.5)
    assert supervisor.phase is RunPhase.RUNNING
    return supervisor


def seat(rank: int) -> RosterPeer:
    return RosterPeer(rank, f"host{rank}", at(5000 + rank))


def told(actions: list[Action]) -> list[str]:
    return [action.message for action in actions if isinstance(action, Notify)]


def state(supervisor: ElasticSupervisor, rank: int) -> RankState:
    return supervisor._states[rank]


def come_back(supervisor: ElasticSupervisor, rank: int, now: float) -> list[Action]:
    """Its pause is over, it is started, and it is ready."""
    assert supervisor.advance(now) == [RestartWorker(rank)]
    return supervisor.handle(WorkerReady(rank, at(5000 + rank)), now + 0.1)


def test_rank_0_is_told_of_itself_alone_and_each_worker_of_rank_0_and_itself() -> None:
    supervisor = starting(3)
    assert supervisor.handle(WorkerReady(2, at(5002)), 1.0) == []
    actions = supervisor.handle(WorkerReady(0, at(5000)), 2.0)
    assert actions == [SendRoster([seat(0)], to=0), SendRoster([seat(0), seat(2)], to=2)]
    assert supervisor.handle(WorkerReady(1, at(5001)), 99.0) == [
        SendRoster([seat(0), seat(1)], to=1)
    ]
    assert supervisor.deadline is None


def test_a_run_that_goes_well() -> None:
    supervisor = running(3)
    assert supervisor.handle(done(0), 3.0) == []
    assert supervisor.handle(done(2), 3.1) == []
    assert supervisor.handle(done(1), 3.2) == []
    for rank in (1, 2):
        assert supervisor.handle(Exited(rank, 0), 3.3) == []
    outcome = outcome_of(supervisor.handle(Exited(0, 0), 3.4))
    assert (outcome.status, outcome.exit_code, outcome.reason) == ("done", 0, "")
    assert outcome.summaries == {rank: {"rank": rank} for rank in range(3)}
    assert outcome.departures == []


def test_a_lost_worker_is_told_once_started_again_and_joins() -> None:
    supervisor = running(4)
    supervisor.handle(step(2, 139), 20.0)
    (line,) = told(supervisor.handle(Exited(2, -9), 30.0))
    assert line.startswith("rank 2 on host2 died from signal 9 (killed) at step 140")
    assert line.endswith("the run continues with 3 of 4 ranks; rank 2 is started again")
    assert supervisor.deadline == 31.0
    assert supervisor.advance(30.9) == []
    roster, tell = come_back(supervisor, 2, 31.0)
    assert roster == SendRoster([seat(0), seat(2)], to=2)
    assert isinstance(tell, Notify)
    assert tell.message == "rank 2 on host2 is back after 1 s; 4 of 4 ranks are at work"
    for rank in (0, 1, 2, 3):
        supervisor.handle(done(rank), 50.0)
    outcome = outcome_of([a for r in range(4) for a in supervisor.handle(Exited(r, 0), 50.1)])
    assert outcome.status == "done"
    (row,) = outcome.departures
    assert (row["rank"], row["host"], row["step"]) == (2, "host2", 140)
    assert (row["after_s"], row["away_s"], row["given_up"]) == (30.0, 1.1, False)


def test_a_worker_that_always_dies_at_once_is_given_up() -> None:
    supervisor = running(3)
    pauses, now, lines = [], 2.0, []
    for number in range(5):
        lines += told(supervisor.handle(Exited(1, 7), now))
        if number == 4:
            break
        assert supervisor.deadline is not None
        pauses.append(supervisor.deadline - now)
        now = supervisor.deadline
        assert supervisor.advance(now) == [RestartWorker(1)]
    assert pauses == [1.0, 2.0, 4.0, 8.0]
    assert len(lines) == 2
    assert "that was 5 times in a row, so it is not started again" in lines[1]
    assert supervisor.deadline is None
    assert supervisor.phase is RunPhase.RUNNING


def test_a_worker_that_works_between_two_losses_is_started_again_without_end() -> None:
    supervisor, now = running(2), 20.0
    for _ in range(12):
        assert len(told(supervisor.handle(Exited(1, -9), now))) == 1
        assert supervisor.deadline == now + 1.0
        come_back(supervisor, 1, now + 1.0)
        now += 20.0
    assert len(supervisor.departures) == 12


def test_an_error_of_its_own_counts_as_a_quick_death_however_late() -> None:
    supervisor, now = running(3), 100.0
    for number in range(5):
        supervisor.handle(failed(1, "ValueError", "shapes do not fit"), now)
        lines = told(supervisor.handle(Exited(1, 3), now))
        if number < 4:
            assert supervisor.deadline is not None
            come_back(supervisor, 1, supervisor.deadline)
        now += 100.0
    assert "ValueError: shapes do not fit" in lines[0] and "not started again" in lines[0]


def unlinked(rank: int, *, is_here: bool = False) -> Reported:
    return Reported(0, Membership(7, rank, is_here, "silent for 9 s", 1))


def test_a_process_that_stands_still_is_ended_and_started_again() -> None:
    supervisor = running(3)
    assert supervisor.handle(unlinked(2), 50.0) == []
    assert supervisor.deadline == 80.0
    assert supervisor.advance(79.9) == []
    assert supervisor.advance(80.0) == [Kill(2)]
    lines = told(supervisor.handle(Exited(2, -9), 80.1))
    assert "rank 2 on host2 stood still, and was ended after 30 s" in lines[0]
    come_back(supervisor, 2, 81.1)
    assert supervisor.advance(500.0) == [], "that was the process before it"


def test_the_loss_of_a_process_that_has_ended_does_not_count_for_the_next() -> None:
    supervisor = running(3)
    supervisor.handle(Exited(2, -9), 50.0)
    come_back(supervisor, 2, 51.0)
    supervisor.handle(unlinked(2), 58.0)  # its host was gone, so the server noticed late
    supervisor.handle(unlinked(2, is_here=True), 58.5)
    assert supervisor.advance(500.0) == []


def test_a_host_out_of_reach_is_asked_until_it_answers_and_told_once() -> None:
    supervisor = running(3)
    lines = told(supervisor.handle(Exited(2, 75, None, "the SSH connection was lost"), 30.0))
    assert "is out of reach" in lines[0] and "rank 2 is tried again until it answers" in lines[0]
    now = 30.0
    for _ in range(50):
        now += 2.0
        assert supervisor.advance(now) == [RestartWorker(2)]
        assert supervisor.handle(NotStarted(2, "host2 does not answer"), now) == []
    assert any("is back after 102 s" in line for line in told(come_back(supervisor, 2, 132.0)))
    assert len(supervisor.departures) == 1


def test_a_worker_that_breaks_the_protocol_or_is_never_ready_is_killed_first() -> None:
    supervisor = running(3)
    assert supervisor.handle(ProtocolViolation(1, "garbage"), 20.0) == [Kill(1)]
    (line,) = told(supervisor.handle(Exited(1, -9), 20.1))
    assert "broke the control protocol: it garbage" in line
    assert supervisor.advance(21.1) == [RestartWorker(1)]
    assert supervisor.deadline == 141.1
    assert supervisor.advance(141.1) == [Kill(1)]
    supervisor.handle(Exited(1, -9), 141.2)
    assert supervisor._last_cause is not None
    assert "not ready within 120 s" in supervisor._last_cause.reason


def test_the_loss_of_rank_0_is_the_end() -> None:
    supervisor = running(3)
    actions = supervisor.handle(Exited(0, -9), 30.0)
    assert actions == [Kill(1), Kill(2)]
    outcome = bury(supervisor, actions, 30.1)
    assert (outcome.status, outcome.failed_rank, outcome.is_lost) == ("failed", 0, True)
    assert "rank 0 on host0 died from signal 9" in outcome.reason


def test_rank_0_that_is_never_ready_is_named() -> None:
    supervisor = starting(2)
    supervisor.handle(WorkerReady(1, at(5001)), 1.0)
    actions = supervisor.advance(120.0)
    assert actions == [Kill(0), Kill(1)]
    assert "rank 0 on host0 not ready within 120 s" in bury(supervisor, actions, 121.0).reason


def test_too_few_ranks_have_a_limit_to_come_back() -> None:
    supervisor = running(2)
    supervisor.handle(Exited(1, 75, None, "the SSH connection was lost"), 30.0)
    now = 30.0
    while now < 88.0:
        now += 2.0
        assert supervisor.advance(now) == [RestartWorker(1)]
        supervisor.handle(NotStarted(1, "host1 does not answer"), now)
    actions = supervisor.advance(90.0)
    assert Kill(0) in actions
    outcome = bury(supervisor, actions, 90.1)
    assert (outcome.status, outcome.failed_rank, outcome.is_lost) == ("failed", 1, True)
    needs = "only 1 of the 2 ranks that it needs were there for 60 s (algorithm.min_ranks=2)"
    assert needs in outcome.reason


def test_the_clock_of_too_few_ranks_begins_anew_when_one_is_back() -> None:
    supervisor = running(2)
    supervisor.handle(Exited(1, -9), 30.0)
    come_back(supervisor, 1, 80.0)
    supervisor.handle(Exited(1, -9), 100.0)
    come_back(supervisor, 1, 150.0)
    assert supervisor.phase is RunPhase.RUNNING


def test_a_run_whose_last_worker_is_given_up_ends_at_once() -> None:
    supervisor = running(2, Elasticity(min_ranks=2, max_quick=1))
    actions = supervisor.handle(Exited(1, 1), 2.0)
    assert Kill(0) in actions
    outcome = bury(supervisor, actions, 2.1)
    assert "1 of the 2 ranks that it needs are left (algorithm.min_ranks=2)" in outcome.reason


def test_workers_that_never_come_end_a_run_that_needs_them() -> None:
    supervisor = starting(3, Elasticity(min_ranks=3))
    for rank in (0, 1):
        supervisor.handle(WorkerReady(rank, at(5000 + rank)), 1.0)
    outcome = bury(supervisor, supervisor.advance(120.0), 120.1)
    assert (outcome.status, outcome.failed_rank) == ("failed", 2)
    assert "rank 2 on host2 never joined" in outcome.reason


def replicas(count: int) -> ElasticSupervisor:
    """Ranks without links, all at work."""
    supervisor = starting(count, Elasticity(links="none", wait_s=60))
    for rank in range(count):
        supervisor.handle(WorkerReady(rank, at(5000 + rank)), 1.0)
    return supervisor


def test_a_rank_that_answers_nobody_is_ended_unless_it_wakes_up() -> None:
    supervisor = replicas(2)
    assert supervisor.handle(Answering(0, is_answering=False), 10.0) == []
    assert supervisor.deadline == 40.0
    assert supervisor.handle(Answering(0, is_answering=True), 39.0) == []
    assert supervisor.advance(41.0) == []
    supervisor.handle(Answering(0, is_answering=False), 50.0)
    assert supervisor.advance(80.0) == [Kill(0)]
    (line,) = told(supervisor.handle(Exited(0, -9), 80.1))
    assert "rank 0 on host0 stood still, and was ended after 30 s" in line
    assert supervisor.advance(81.1) == [RestartWorker(0)]


def test_replicas_end_only_when_all_are_lost_for_too_long() -> None:
    supervisor = replicas(2)
    for rank in (0, 1):
        supervisor.handle(Exited(rank, -9), 10.0)
    assert supervisor.phase is RunPhase.RUNNING
    for rank in (0, 1):  # they are started again, and do not come
        assert supervisor.advance(11.0 + rank) in ([RestartWorker(0), RestartWorker(1)], [])
    assert supervisor.advance(71.0) == [Kill(0), Kill(1)]
    supervisor.handle(Exited(0, -9), 71.5)
    outcome = outcome_of(supervisor.handle(Exited(1, -9), 71.5))
    assert outcome.status == "failed"
    assert "only 0 of the 1 ranks that it needs were there for 60 s" in outcome.reason
