"""Who is to blame when the signs are weak, and how the end of a process is put into words."""

from __future__ import annotations

from smolrun.launch.cause import describe_exit
from smolrun.launch.control import EXIT_ABANDONED
from smolrun.launch.moves import Exited
from tests.launch.test_supervisor import failed, outcome_of, running


def test_a_rank_that_died_without_a_word_beats_an_error_that_was_reported_before() -> None:
    supervisor = running(2)
    supervisor.handle(failed(0, "ValueError", "no answer from the other"), 2.0)
    supervisor.handle(Exited(1, -9), 2.1)
    assert outcome_of(supervisor.handle(Exited(0, 3), 2.2)).failed_rank == 1


def test_two_ranks_that_lost_each_other_still_give_one_culprit() -> None:
    supervisor = running(2)
    supervisor.handle(failed(1, "PeerLost", "lost rank 0: silent", 0), 2.0)
    supervisor.handle(failed(0, "PeerLost", "lost rank 1: silent", 1), 2.0)
    supervisor.handle(Exited(0, 3), 2.0)
    outcome = outcome_of(supervisor.handle(Exited(1, 3), 2.0))
    assert "was cut off from the others" in outcome.reason
    assert outcome.failed_rank == 0


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


def test_how_ends_are_described() -> None:
    assert describe_exit(-15) == "died from signal 15 (terminated)"
    assert describe_exit(-64000) == "died from signal 64000 (unknown)"
    assert describe_exit(0xC0000005) == "died with exit code 0xc0000005"
    assert "no longer heard the driver" in describe_exit(EXIT_ABANDONED)
