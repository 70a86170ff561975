"""When which address is dialed, and which connection is nominated, without a socket."""

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


def selection(*, is_controlling: bool = True) -> PathSelection:
    return PathSelection(is_controlling=is_controlling, addresses=ADDRESSES, now=100.0)


def preferences(selecting: PathSelection, now: float) -> list[int]:
    return [one.preference for one in selecting.due(now)]


def test_the_best_address_has_a_head_start_over_the_next() -> None:
    selecting = selection()
    assert preferences(selecting, 100.0) == [0]
    assert preferences(selecting, 100.0 + ATTEMPT_DELAY_S - 0.01) == []
    assert preferences(selecting, 100.0 + ATTEMPT_DELAY_S) == [1]
    assert preferences(selecting, 109.0) == [2]
    assert preferences(selecting, 110.0) == [], "all are being dialed"


def test_the_lower_rank_dials_too_but_a_moment_later() -> None:
    selecting = selection(is_controlling=False)
    assert preferences(selecting, 100.0) == []
    assert preferences(selecting, 100.0 + LOWER_RANK_DELAY_S) == [0]


def test_after_a_refusal_the_next_address_is_due_at_once_and_the_first_is_retried() -> None:
    selecting = selection()
    (best,) = selecting.due(100.0)
    selecting.failed(best, "refused", 100.01)
    assert preferences(selecting, 100.01) == [1]
    assert preferences(selecting, 100.01 + FIRST_RETRY_S) == [0]
    assert best.outcome == "no answer yet"


def test_retry_intervals_grow_up_to_a_limit() -> None:
    selecting = selection()
    (best,), now, pauses = selecting.due(100.0), 100.0, []
    for _ in range(8):
        selecting.failed(best, "refused", now)
        pauses.append(best.due_s - now)
        now = best.due_s
        assert best in selecting.due(now)
    assert pauses[0] == pauses[1] / 2 == FIRST_RETRY_S or abs(pauses[0] - FIRST_RETRY_S) < 1e-6
    assert max(pauses) <= MAX_RETRY_S + 1e-6


def test_the_best_address_is_nominated_at_once() -> None:
    selecting = selection()
    selecting.authenticated("best", 0, 101.0)
    assert selecting.nominate(101.0) == "best"
    assert selecting.nominate(101.0) is None, "once"


def test_a_worse_address_waits_for_a_better_one_that_may_still_come() -> None:
    selecting = selection()
    selecting.authenticated("worse", 1, 101.0)
    assert selecting.nominate(101.0) is None
    selecting.authenticated("best", 0, 101.0 + GRACE_S / 2)
    assert selecting.nominate(101.0 + GRACE_S / 2) == "best"


def test_a_worse_address_is_nominated_after_the_grace_time() -> None:
    selecting = selection()
    selecting.authenticated("worse", 1, 101.0)
    assert selecting.nominate(101.0 + GRACE_S) == "worse"


def test_another_connection_is_nominated_when_the_first_breaks() -> None:
    selecting = selection()
    selecting.authenticated("first", 0, 101.0)
    selecting.authenticated("second", 0, 101.1)
    assert selecting.nominate(101.1) == "first"
    selecting.lost("first")
    assert selecting.nominate(101.2) == "second"


def test_the_lower_rank_never_nominates() -> None:
    selecting = selection(is_controlling=False)
    selecting.authenticated("best", 0, 101.0)
    assert selecting.nominate(200.0) is None


def test_nothing_is_dialed_once_a_path_is_selected() -> None:
    selecting = selection()
    selecting.selected = "path"
    assert preferences(selecting, 200.0) == []
