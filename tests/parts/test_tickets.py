"""Tickets against everything that holders may do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.errors import ProtocolError
from smolrun.parts.damping import DAMPING
from smolrun.parts.tickets import Tickets

STEPS = 6
MOVES = st.lists(
    st.tuples(st.sampled_from(["take", "finish", "give_back", "lose", "save"]), st.integers(1, 3)),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(MOVES, st.integers(1, 4), st.sampled_from([None, 0, 1, 2]))
def test_nothing_is_lost_and_nothing_done_twice(
    moves: list[tuple[str, int]], per_step: int, bound: int | None
) -> None:
    tickets = Tickets(per_step, bound)
    held: dict[int, list[int]] = {1: [], 2: [], 3: []}
    done: list[int] = []
    for what, who in moves:
        mine = held[who]
        if what == "take":
            ticket = tickets.take(who, STEPS)
            if ticket is not None:
                assert ticket not in done and all(ticket not in other for other in held.values())
                if bound is not None:
                    before = (ticket // per_step - bound) * per_step
                    assert set(range(before)) <= set(done), "the steps before are done"
                    assert len(mine) <= bound
                    assert max(0, before) <= tickets.needs(ticket) <= len(done)
                mine.append(ticket)
        elif what == "finish" and mine:
            done.append(mine.pop(0))
            tickets.finish(who, done[-1])
        elif what == "give_back" and mine:
            tickets.give_back(who, mine.pop())
        elif what == "lose":
            assert tickets.lose(who) == sorted(mine)
            mine.clear()
        elif what == "save":
            saved = tickets.state()
            tickets = Tickets(99, bound)
            tickets.restore(saved)
            for other in held.values():
                other.clear()
        assert tickets.num_done == len(done)
    # Whoever is left does the rest, and all is done exactly once.
    for who, mine in held.items():
        for ticket in mine:
            tickets.finish(who, ticket)
            done.append(ticket)
    while (ticket := tickets.take(1, STEPS)) is not None:
        tickets.finish(1, ticket)
        done.append(ticket)
    assert sorted(done) == list(range(STEPS * per_step))
    assert tickets.is_over(STEPS) and not tickets.is_over(STEPS + 1)


def test_what_comes_back_is_taken_first() -> None:
    tickets = Tickets(2)
    assert [tickets.take(who, 9) for who in (1, 2, 1, 2)] == [0, 1, 2, 3]
    tickets.give_back(2, 3)
    assert tickets.lose(1) == [0, 2]
    assert [tickets.take(3, 9) for _ in range(4)] == [0, 2, 3, 4]
    assert tickets.held_by(3) == [0, 2, 3, 4]


def test_only_the_holder_can_finish_a_ticket() -> None:
    tickets = Tickets(1)
    tickets.take(1, 9)
    for who in (2, 1, 1):
        if who == 1 and tickets.held_by(1):
            tickets.finish(1, 0)
        else:
            with pytest.raises(ProtocolError, match=f"rank {who} does not have ticket 0"):
                tickets.finish(who, 0)


def test_a_fast_rank_waits_for_the_slowest_at_the_bound() -> None:
    """SSP with K = 1: while rank 2 is at step 0, rank 1 gets tickets of steps 0 and 1, no others;
    and those of step 2 need all updates of step 0."""
    tickets = Tickets(2, bound=1)
    assert tickets.take(2, 9) == 0
    assert [tickets.take(1, 9) for _ in range(3)] == [1, 2, None], "two in hands, no more"
    tickets.finish(1, 1)
    assert tickets.take(1, 9) == 3
    for ticket in (2, 3):
        assert tickets.needs(ticket) == 0
        tickets.finish(1, ticket)
    assert tickets.take(1, 9) is None
    tickets.finish(2, 0)
    assert tickets.take(1, 9) == 4
    assert tickets.needs(4) == 4, "all of step 0 was done with the fourth update"


@pytest.mark.parametrize(
    ("name", "factors"), [("none", [1, 1]), ("inverse", [1, 0.25]), ("inverse_sqrt", [1, 0.5])]
)
def test_damping(name: str, factors: list[float]) -> None:
    assert [DAMPING[name](age) for age in (0, 3)] == factors
