"""Which address is dialed when, and which connection is kept: decided without a socket."""

from __future__ import annotations

from smolrun.mesh.rendezvous import (
    ATTEMPT_DELAY_S,
    FIRST_RETRY_S,
    GRACE_S,
    LOWER_RANK_DELAY_S,
    MAX_RETRY_S,
    PathSelection,
)

ADDRESSES = [(0, "10.0.0.1", 4000), (1, "192.168.0.1", 4001), (2, "fd00::1", 4002)]


def pairing(*, is_controlling: bool = True) -> PathSelection[str]:
    return PathSelection(is_controlling=is_controlling, addresses=ADDRESSES, now=100.0)


def places(pair: PathSelection[str], now: float) -> list[int]:
    return [one.preference for one in pair.due(now)]


def test_the_best_address_has_a_head_start_over_the_next() -> None:
    pair = pairing()
    assert places(pair, 100.0) == [0]
    assert places(pair, 100.0 + ATTEMPT_DELAY_S - 0.01) == []
    assert places(pair, 100.0 + ATTEMPT_DELAY_S) == [1]
    assert places(pair, 109.0) == [2]
    assert places(pair, 110.0) == [], "all are under way"


def test_the_lower_rank_dials_too_but_a_moment_later() -> None:
    pair = pairing(is_controlling=False)
    assert places(pair, 100.0) == []
    assert places(pair, 100.0 + LOWER_RANK_DELAY_S) == [0]


def test_an_address_that_refuses_makes_room_for_the_next_at_once_and_is_tried_again() -> None:
    pair = pairing()
    (best,) = pair.due(100.0)
    pair.failed(best, "refused", 100.01)
    assert places(pair, 100.01) == [1]
    assert places(pair, 100.01 + FIRST_RETRY_S) == [0]
    assert best.outcome == "no answer yet"


def test_pauses_grow_up_to_a_limit() -> None:
    pair = pairing()
    (best,), now, pauses = pair.due(100.0), 100.0, []
    for _ in range(8):
        pair.failed(best, "refused", now)
        pauses.append(best.due_s - now)
        now = best.due_s
        assert best in pair.due(now)
    assert pauses[0] == pauses[1] / 2 == FIRST_RETRY_S or abs(pauses[0] - FIRST_RETRY_S) < 1e-6
    assert max(pauses) <= MAX_RETRY_S + 1e-6


def test_the_best_address_is_kept_at_once() -> None:
    pair = pairing()
    pair.authenticated("best", 0, 101.0)
    assert pair.nominate(101.0) == "best"
    assert pair.nominate(101.0) is None, "told once"


def test_a_worse_address_waits_for_a_better_one_that_may_still_come() -> None:
    pair = pairing()
    pair.authenticated("worse", 1, 101.0)
    assert pair.nominate(101.0) is None
    pair.authenticated("best", 0, 101.0 + GRACE_S / 2)
    assert pair.nominate(101.0 + GRACE_S / 2) == "best"


def test_a_worse_address_is_kept_when_nothing_better_comes() -> None:
    pair = pairing()
    pair.authenticated("worse", 1, 101.0)
    assert pair.nominate(101.0 + GRACE_S) == "worse"


def test_another_is_chosen_when_the_chosen_one_breaks() -> None:
    pair = pairing()
    pair.authenticated("first", 0, 101.0)
    pair.authenticated("second", 0, 101.1)
    assert pair.nominate(101.1) == "first"
    pair.lost("first")
    assert pair.nominate(101.2) == "second"


def test_the_lower_rank_never_chooses() -> None:
    pair = pairing(is_controlling=False)
    pair.authenticated("best", 0, 101.0)
    assert pair.nominate(200.0) is None


def test_nothing_is_dialed_once_a_path_is_kept() -> None:
    pair = pairing()
    pair.selected = "path"
    assert places(pair, 200.0) == []
