"""When a run is started again: every case by itself, and what always holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolrun.config.cluster import RestartConfig
from smolrun.driver.restart import GiveUp, Relaunch, Wait, decide
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_FAILED, RunOutcome

LOST = RunOutcome("failed", EXIT_FAILED, "rank 1 on b died", 1, "b", is_lost=True)
HOSTS = ("a", "b", "c")
POLICY = RestartConfig(max=2, wait_s=10.0, min_hosts=2)


def ask(answered: str, **changes: object) -> Relaunch | Wait | GiveUp:
    arguments = {"starts": 0, "lost_at": 100.0, "now": 100.0, **changes}
    return decide(POLICY, LOST, HOSTS, answered, **arguments)  # type: ignore[arg-type]


def test_all_answer_so_it_begins_at_once() -> None:
    assert ask("cab") == Relaunch(HOSTS)


def test_a_missing_host_is_waited_for_and_then_left_out() -> None:
    assert ask("ac", now=109.9) == Wait(("b",), 110.0)
    assert ask("ac", now=110.0) == Relaunch(("a", "c"))


def test_too_few_is_the_end_with_what_is_missing() -> None:
    assert ask("c", now=109.0) == Wait(("a", "b"), 110.0)
    assert ask("c", now=110.0) == GiveUp(
        "a, b did not answer within 10 s; left: c (cluster.restart.min_hosts=2)"
    )
    assert "left: no host (" in ask("", now=110.0).reason  # type: ignore[union-attr]


def test_max_counts_every_start() -> None:
    assert isinstance(ask("abc", starts=1), Relaunch)
    assert ask("abc", starts=2) == GiveUp("it was restarted 2 times already (cluster.restart.max)")


@pytest.mark.parametrize(
    "outcome",
    [
        RunOutcome("done", EXIT_DONE),
        RunOutcome("stopped", 130),
        RunOutcome("failed", EXIT_FAILED, "rank 0 on a failed: ValueError: mine", 0, "a"),
    ],
)
def test_what_is_not_lost_is_not_tried_again(outcome: RunOutcome) -> None:
    assert decide(POLICY, outcome, HOSTS, HOSTS, starts=0, lost_at=0, now=0) == GiveUp()


def test_a_suspect_is_left_out_while_there_are_enough_others() -> None:
    assert ask("abc", suspects="b") == Relaunch(("a", "c"))
    assert ask("abc", suspects="bc") == Relaunch(HOSTS)


names = st.lists(st.sampled_from("abcdef"), unique=True)


@given(
    policy=st.builds(
        RestartConfig,
        max=st.integers(1, 4),
        wait_s=st.floats(0, 100),
        min_hosts=st.integers(1, 6),
    ),
    hosts=names.filter(bool),
    answered=names,
    suspects=names,
    starts=st.integers(0, 5),
    passed_s=st.floats(0, 200),
)
def test_what_always_holds(
    policy: RestartConfig,
    hosts: list[str],
    answered: list[str],
    suspects: list[str],
    starts: int,
    passed_s: float,
) -> None:
    move = decide(
        policy, LOST, hosts, answered, starts=starts, suspects=suspects, lost_at=50.0,
        now=50.0 + passed_s,
    )  # fmt: skip
    there = [host for host in hosts if host in answered]
    if isinstance(move, Relaunch):
        assert starts < policy.max
        assert len(move.hosts) >= policy.min_hosts
        assert [host for host in there if host in move.hosts] == list(move.hosts)
        # Nobody is left out but for a reason.
        assert set(there) - set(move.hosts) <= set(suspects)
    elif isinstance(move, Wait):
        assert move.until > 50.0 + passed_s, "a wait ends"
        assert set(move.missing) == set(hosts) - set(there) != set()
    else:
        assert move.reason
        assert starts >= policy.max or len(there) < policy.min_hosts
