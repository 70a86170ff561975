"""Who is to blame when the signs are weak, and how the end of a process is put into words."""

from __future__ import annotations

import pytest

from smolrun.errors import BROKE_PROTOCOL, PeerLost
from smolrun.launch.control import EXIT_ABANDONED, OUT_OF_MEMORY, ErrorReport, ResultMessage
from smolrun.launch.root_cause import RankState, describe_exit, pick_cause
from smolrun.launch.supervisor_events import (
    Exited,
    Finish,
    HostSilent,
    Input,
    Interrupted,
    Kill,
    NotStarted,
    ProtocolViolation,
    RunOutcome,
    WorkerFinished,
)
from tests.launch.test_supervisor import (
    at,
    bury,
    done,
    failed,
    outcome_of,
    running,
    starting,
    training,
)


def test_a_rank_that_died_without_a_word_beats_an_error_that_was_reported_before() -> None:
    supervisor = running(2)
    supervisor.handle(failed(0, "ValueError", "no answer from the other"), 2.0)
    supervisor.handle(Exited(1, -9), 2.1)
    assert outcome_of(supervisor.handle(Exited(0, 3), 2.2)).failed_rank == 1


@pytest.mark.parametrize(("has_steps", "when"), [(True, " before its first step"), (False, "")])
def test_what_has_no_steps_does_not_fail_before_the_first_one(has_steps: bool, when: str) -> None:
    state = RankState(1, "mini2", "log", has_steps, at(5001), exit_code=-9)
    reason = pick_cause([state]).reason
    assert reason.startswith(f"rank 1 on mini2 died from signal 9 (killed){when}; was its memory")


def test_two_ranks_that_lost_each_other_still_give_one_culprit() -> None:
    supervisor = running(2)
    supervisor.handle(failed(1, "PeerLost", "lost rank 0: silent", 0), 2.0)
    supervisor.handle(failed(0, "PeerLost", "lost rank 1: silent", 1), 2.0)
    supervisor.handle(Exited(0, 3), 2.0)
    outcome = outcome_of(supervisor.handle(Exited(1, 3), 2.0))
    words = (
        "rank 0 on host0 and rank 1 on host1 lost each other before its first step (silent); log"
    )
    assert outcome.reason.startswith(words)
    assert outcome.failed_rank == 0


def test_a_rank_that_two_others_miss_was_cut_off() -> None:
    supervisor = running(3)
    supervisor.handle(failed(0, "PeerLost", "lost rank 1: silent", 1), 2.0)
    supervisor.handle(failed(2, "PeerLost", "lost rank 1: silent", 1), 2.0)
    supervisor.handle(failed(1, "PeerLost", "lost rank 0: silent", 0), 2.0)
    outcome = bury(supervisor, supervisor.advance(4.1) + supervisor.advance(9.2), 9.2)
    assert outcome.reason.startswith(
        "rank 1 on host1 was cut off from the others before its first step (silent); 2 other ranks"
    )


def test_of_two_that_miss_each_other_the_one_that_does_not_answer_us_was_cut_off() -> None:
    supervisor = running(2)
    supervisor.handle(failed(1, "PeerLost", "lost rank 0: silent", 0), 2.0)  # it can still send
    assert supervisor.handle(HostSilent(1), 2.1) == []
    actions = supervisor.handle(failed(0, "PeerLost", "lost rank 1: closed", 1), 2.2)
    assert actions == [Kill(1)]  # and rank 0 may leave on its own
    supervisor.handle(Exited(0, 3), 2.7)
    outcome = outcome_of(supervisor.handle(Exited(1, 75, lost="no answer for 4 s"), 2.7))
    assert outcome.failed_rank == 1
    assert outcome.reason == (
        "rank 1 on host1 was cut off from the others before its first step (closed); 1 other rank "
        "ended with it; log: logs/rank1-host1.log; "
        "host1 is out of reach: what still runs there ends by itself"
    )


def test_what_a_rank_was_told_is_no_second_witness() -> None:
    supervisor = running(3)
    supervisor.handle(failed(1, "PeerLost", "lost rank 2: silent", 2), 2.0)
    told = ErrorReport("PeerLost", "lost rank 2: rank 1 lost it", 2, reported_by=1)
    supervisor.handle(WorkerFinished(0, ResultMessage(status="failed", error=told)), 2.0)
    supervisor.handle(failed(2, "PeerLost", "lost rank 0: it left the run", 0), 2.0)
    outcome = bury(supervisor, supervisor.advance(4.1) + supervisor.advance(9.2), 9.2)
    assert outcome.reason.startswith(
        "rank 2 on host2 and rank 1 on host1 lost each other before its first step (silent); "
        "1 other rank ended with them"
    )


def lost(rank: int, peer: int, reason: str, *, reported_by: int | None = None) -> WorkerFinished:
    """What the worker of `rank` reports when its mesh has lost `peer`."""
    error = PeerLost(peer, 0, reason, reported_by)
    report = ErrorReport("PeerLost", str(error), peer, reported_by, error.broke_protocol)
    return WorkerFinished(rank, ResultMessage(status="failed", error=report))


@pytest.mark.parametrize("first", [0, 1])
def test_a_broken_protocol_outranks_the_connection_that_it_ended(first: int) -> None:
    supervisor = running(2)
    reports = [
        lost(0, 1, f"{BROKE_PROTOCOL}: a slice that was never granted"),
        lost(1, 0, "receiving failed: Connection reset by peer"),
    ]
    supervisor.handle(reports[first], 2.0)
    supervisor.handle(reports[1 - first], 2.1)
    supervisor.handle(Exited(0, 3), 2.2)
    outcome = outcome_of(supervisor.handle(Exited(1, 3), 2.2))
    assert (outcome.failed_rank, outcome.failed_host, outcome.is_lost) == (1, "host1", False)
    assert outcome.reason.startswith(
        "rank 1 on host1 broke the protocol of the mesh before its first step "
        "(a slice that was never granted); 1 other rank ended with it"
    )


def test_a_broken_protocol_outranks_the_votes_of_those_who_only_lost_a_link() -> None:
    supervisor = running(4)
    supervisor.handle(lost(2, 0, "the connection was closed"), 2.0)
    supervisor.handle(lost(3, 0, "the connection was closed"), 2.0)
    supervisor.handle(lost(1, 0, "the connection was closed"), 2.0)
    supervisor.handle(lost(0, 1, f"{BROKE_PROTOCOL}: two tensors for one tag"), 2.1)
    outcome = bury(supervisor, supervisor.advance(4.1) + supervisor.advance(9.2), 9.2)
    assert outcome.failed_rank == 1


def test_the_rank_that_others_wait_for_is_blamed_not_the_one_that_gave_up_first() -> None:
    supervisor = running(3)
    supervisor.handle(failed(0, "WaitTimeout", "all_reduce: not done after 300 s", 1), 2.0)
    supervisor.handle(lost(2, 0, "it left the run"), 2.1)  # because rank 0 ended
    supervisor.handle(lost(1, 0, "it left the run"), 2.1)
    outcome = bury(supervisor, supervisor.advance(4.1) + supervisor.advance(9.2), 9.2)
    assert (outcome.failed_rank, outcome.failed_host) == (1, "host1")
    assert "did not do its part before its first step (all_reduce: not done" in outcome.reason


def test_when_nobody_is_blamed_the_first_to_report_is_named() -> None:
    supervisor = running(2)
    supervisor.handle(failed(1, "WaitTimeout", "no step within 300 s"), 2.0)
    supervisor.handle(failed(0, "MeshClosed", "closed"), 2.0)
    supervisor.handle(Exited(0, 3), 2.0)
    assert outcome_of(supervisor.handle(Exited(1, 3), 2.0)).failed_rank == 1


def test_a_blamed_rank_that_does_not_exist_is_ignored() -> None:
    supervisor = running(1)
    supervisor.handle(failed(0, "PeerLost", "lost rank 9: odd", 9), 2.0)
    assert outcome_of(supervisor.handle(Exited(0, 3), 2.0)).failed_rank == 0


def test_a_host_out_of_reach_is_no_death_by_its_exit_code() -> None:
    supervisor = running(2)
    why = "the SSH connection was lost (no answer for 15 s)"
    supervisor.handle(Exited(1, EXIT_ABANDONED, lost=why), 2.0)
    outcome = outcome_of(supervisor.handle(Exited(0, 3), 2.2))
    assert outcome.failed_rank == 1
    assert "is out of reach before its first step: the SSH connection was lost" in outcome.reason
    assert "what runs there ends by itself" in outcome.reason
    assert outcome.is_lost


def test_how_ends_are_described() -> None:
    assert describe_exit(-15) == "died from signal 15 (terminated)"
    assert describe_exit(-64000) == "died from signal 64000 (unknown)"
    assert describe_exit(0xC0000005) == "died with exit code 0xc0000005"
    assert "no longer heard the driver" in describe_exit(EXIT_ABANDONED)


def ended(*inputs: Input) -> RunOutcome:
    """The end of a run of two ranks to which this happened; whoever is killed then ends."""
    supervisor = running(2)
    waiting = list(inputs)
    now = 2.0
    while True:
        actions = supervisor.handle(waiting.pop(0), now) if waiting else supervisor.advance(now)
        waiting += [Exited(action.rank, -9) for action in actions if isinstance(action, Kill)]
        if any(isinstance(action, Finish) for action in actions):
            return outcome_of(actions)
        if not waiting:
            assert supervisor.deadline is not None and now < 1000
            now = max(now, supervisor.deadline)


@pytest.mark.parametrize(
    "inputs",
    [
        [Exited(1, -9)],
        [Exited(1, 1)],
        [Exited(1, EXIT_ABANDONED)],
        [failed(0, "PeerLost", "lost rank 1: silent", 1)],
        [failed(0, "WaitTimeout", "no step within 300 s"), Exited(0, 3)],
        [NotStarted(1, "ssh: connection refused")],
        [Exited(1, -9), failed(0, "PeerLost", "lost rank 1: closed", 1)],
        [done(0)],  # and rank 1 never reports
    ],
)
def test_what_is_gone_or_out_of_reach_is_lost(inputs: list[Input]) -> None:
    outcome = ended(*inputs)
    assert outcome.status == "failed" and outcome.is_lost


@pytest.mark.parametrize(
    "inputs",
    [
        [failed(1, "ValueError", "my own mistake"), failed(0, "PeerLost", "lost rank 1", 1)],
        [failed(1, OUT_OF_MEMORY, "20 GB wanted")],
        [Exited(1, -9, "Linux ended it: memory was full")],
        [failed(1, "TrainingError", "the loss is not a number")],
        [failed(1, "ConfigError", "no such optimizer")],
        [ProtocolViolation(1, "sent a line that is no message")],
        [Exited(1, -9), Interrupted()],  # lost, but the user wants it to end
    ],
)
def test_what_would_come_again_is_not_lost(inputs: list[Input]) -> None:
    outcome = ended(*inputs)
    assert outcome.status == "failed" and not outcome.is_lost


def test_a_host_that_is_never_ready_is_lost() -> None:
    supervisor = starting(2)
    assert bury(supervisor, supervisor.advance(121.0), 122.0).is_lost


def test_a_host_that_no_kill_reaches_is_told() -> None:
    supervisor = training(1)
    supervisor.handle(Interrupted(), 2.0)
    supervisor.handle(Interrupted(), 2.5)
    outcome = outcome_of(supervisor.handle(Exited(0, 75, lost="no answer for 4 s"), 2.6))
    assert "host0 is out of reach: what still runs there ends by itself" in outcome.reason
