"""Who trained, summed up from the events of a parameter server."""

from __future__ import annotations

from smolrun.events import PushApplied, PushDropped
from smolrun.tracking.push_record import PushRecord


def test_shares_ages_and_what_was_dropped() -> None:
    record = PushRecord()
    assert (record.line, record.summary()) == ("", {})
    for rank, age in ((1, 0), (1, 3), (2, 1)):
        record.record(PushApplied(0, rank, 7, 5, age, samples=8, grad_norm=1.0))
    for reason in ("its rank is gone", "its rank is gone", "it was not finite"):
        record.record(PushDropped(0, 2, 8, reason))
    assert record.summary()["1"] == {
        "pushes": 2,
        "samples": 16,
        "share": 0.6667,
        "mean_age": 1.5,
        "max_age": 3,
        "dropped": {},
    }
    assert record.summary()["2"]["dropped"] == {"its rank is gone": 2, "it was not finite": 1}
    assert record.line == (
        "rank 1 67% of the samples, 1.5 updates late; "
        "rank 2 33% of the samples, 1.0 updates late, 3 went to others"
    )
