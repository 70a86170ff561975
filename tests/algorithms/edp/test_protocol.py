"""Totals over the pushes of one global batch."""

from __future__ import annotations

from smolrun.algorithms.edp.protocol import BatchTotals, PushHeader

HEADER = PushHeader(
    item=0, version=0, loss_sum=6.0, num_targets=2.0, num_samples=2.0, wants_stop=0.0
)


def test_a_gradient_of_norm_zero_is_not_skipped() -> None:
    totals = BatchTotals()
    totals.add(1, HEADER, 0.0)
    assert totals.grad_norm == 0.0 and not totals.nonfinite_ranks
    totals.add(2, HEADER, 1.5)
    totals.add(1, HEADER, 0.0)
    assert totals.grad_norm == 0.0 and not totals.nonfinite_ranks
    assert (totals.num_pushes, totals.loss_sum, totals.num_targets) == (3, 18.0, 6.0)


def test_a_skipped_push_keeps_the_last_norm_and_names_its_rank() -> None:
    totals = BatchTotals()
    totals.add(2, HEADER, None)
    assert totals.grad_norm is None
    totals.add(1, HEADER, 1.5)
    totals.add(3, HEADER, None)
    assert totals.grad_norm == 1.5 and totals.nonfinite_ranks == {2, 3}
