"""The advice at the end of a run names only keys that this run can set."""

from __future__ import annotations

import pytest

from smolrun.cli.compose import compose
from smolrun.driver.trackers import time_report
from tests.tracking.test_bottleneck import train


@pytest.mark.parametrize(
    ("overrides", "is_advised"),
    [
        (["algorithm=classicdp"], True),
        (["algorithm=fsdp", "algorithm.stage=2"], True),
        (["algorithm=fsdp", "algorithm.stage=3"], False),
        (["algorithm=syncps"], True),
        (["algorithm=syncps", "algorithm.straggler_timeout_s=1"], False),
    ],
    ids=["classicdp", "stage 2", "stage 3", "syncps", "syncps that leaves stragglers"],
)
def test_staleness_is_advised_where_it_is_allowed(overrides: list[str], is_advised: bool) -> None:
    teller = time_report(compose([*overrides, "cluster.ranks=2"]), lambda said: None)
    train(teller, range(5), 2.0, 1.0)  # half of the time is the network's
    assert ("staleness.bound" in teller.line) is is_advised


@pytest.mark.parametrize(
    ("overrides", "is_advised"),
    [
        (["algorithm=classicdp", "cluster.ranks=2", "staleness.bound=1"], True),
        (["algorithm=syncps", "cluster.ranks=2", "algorithm.straggler_timeout_s=1"], True),
        (["algorithm=classicdp", "cluster.ranks=2", "quantization=int8"], False),
        (["algorithm=single"], False),
    ],
    ids=["classicdp", "syncps that leaves stragglers", "quantized", "single"],
)
def test_quantization_is_advised_where_gradients_travel_whole(
    overrides: list[str], is_advised: bool
) -> None:
    teller = time_report(compose(overrides), lambda said: None)
    train(teller, range(5), 2.0, 1.0, bytes_sent=10**6)
    assert ("quantization=int8" in teller.line) is is_advised


@pytest.mark.parametrize(
    ("overrides", "bubble"),
    [
        (["algorithm=mp"], "50 % pipeline bubble"),
        (["algorithm=mp", "training.micro_batch_size=4"], "50 % pipeline bubble"),
        (["algorithm=mp_pipeline"], "6 % pipeline bubble"),
        (["algorithm=mp_pipeline", "algorithm.micro_batches=2"], "25 % pipeline bubble"),
        (["algorithm=mp_pipeline", "training.micro_batch_size=1"], "2 % pipeline bubble"),
        (["algorithm=mp_pipeline", "staleness.bound=1"], None),
        (["algorithm=classicdp"], None),
    ],
)
def test_stages_wait_for_each_other_as_often_as_their_pipeline_is_empty(
    overrides: list[str], bubble: str | None
) -> None:
    """Each of two ranks computes for a second and waits for another one."""
    keys = ["cluster.ranks=2", "training.global_batch_size=32"]
    teller = time_report(compose([*overrides, *keys]), lambda said: None)
    train(teller, range(5), 2.0, 1.0)
    assert ("bubble" in teller.line) is (bubble is not None)
    assert bubble is None or bubble in teller.line
