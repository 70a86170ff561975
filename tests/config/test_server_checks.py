"""Rules about algorithms with a server: what is refused, and why."""

from __future__ import annotations

import pytest

from smolrun.cli.compose import compose
from smolrun.errors import ConfigError

HOSTS = "cluster.hosts=[{name: mini1}, {name: pi5}]"


@pytest.mark.parametrize(
    ("overrides", "key", "what"),
    [
        (["algorithm=classicdp", HOSTS, "cluster.server=pi5"], "cluster.server = pi5", "no server"),
        ([HOSTS, "cluster.server=mini"], "cluster.server = mini", "did you mean mini1?"),
        (["cluster.server=pi4"], "cluster.server = pi4", "there are no cluster.hosts"),
        (
            ["cluster.ranks=1", "algorithm.server_trains=false"],
            "algorithm.server_trains = false",
            "the only rank",
        ),
        (
            ["algorithm.straggler_s=1", "staleness.bound=1"],
            "algorithm.straggler_s = 1.0",
            "staleness.bound",
        ),
        (
            ["algorithm.straggler_s=1", "training.check_replicas=true"],
            "algorithm.straggler_s = 1.0",
            "older weights",
        ),
        (
            ["algorithm.straggler_s=1", "training.resync_every=4"],
            "algorithm.straggler_s = 1.0",
            "all ranks meet",
        ),
        (["algorithm.pull=average"], "algorithm.pull = average", "keeps no average"),
        (
            ["algorithm.polyak=0.9", "precision=bf16_params"],
            "algorithm.polyak = 0.9",
            "more digits",
        ),
        (
            ["cluster.ranks=4", "algorithm.server_trains=false", "training.global_batch_size=2"],
            "training.global_batch_size = 2",
            "too small for 3 ranks",
        ),
    ],
)
def test_what_is_refused(overrides: list[str], key: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["algorithm=syncps", *overrides])
    (line,) = [line for line in str(caught.value).splitlines() if key in line]
    assert what in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.straggler_s=1", "staleness.bound=0"],
        ["algorithm.straggler_s=1", "training.resync_every=0"],
        ["training.resync_every=4"],
        ["algorithm.polyak=0.9", "algorithm.pull=average", "staleness.bound=2"],
        ["cluster.ranks=3", "algorithm.server_trains=false", "training.global_batch_size=2"],
        [HOSTS, "cluster.server=pi5", "precision=bf16_params"],
    ],
)
def test_what_goes_together(overrides: list[str]) -> None:
    compose(["algorithm=syncps", *overrides])
