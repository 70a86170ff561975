"""What the pushes of one global batch tell together."""

from __future__ import annotations

from smolrun.parts.push_pull import Facts, Sums

FACTS = Facts(ticket=0, version=0, loss_sum=6.0, weight=2.0, samples=2.0, wants_stop=0.0)


def test_a_gradient_of_length_zero_is_no_skipped_one() -> None:
    sums = Sums()
    sums.add(1, FACTS, 0.0)
    assert sums.grad_norm == 0.0 and not sums.culprits
    sums.add(2, FACTS, 1.5)
    sums.add(1, FACTS, 0.0)
    assert sums.grad_norm == 0.0 and not sums.culprits
    assert (sums.pushes, sums.loss, sums.weight) == (3, 18.0, 6.0)


def test_a_skipped_one_leaves_the_norm_of_the_last_and_is_named() -> None:
    sums = Sums()
    sums.add(2, FACTS, None)
    assert sums.grad_norm is None
    sums.add(1, FACTS, 1.5)
    sums.add(3, FACTS, None)
    assert sums.grad_norm == 1.5 and sums.culprits == {2, 3}
