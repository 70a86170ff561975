"""Which rank lives where."""

from __future__ import annotations

import pytest

from smolrun.cli.compose import compose
from smolrun.config import RankPlan, ranks, resolved, savers, validate, world_size

HOSTS = "[{name: a, ranks: 2, device: cpu}, {name: b, address: 127.0.0.9}]"


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ([], 2),
        (["algorithm=single"], 1),
        (["cluster.ranks=4"], 4),
        (["cluster.ranks=1"], 1),
        ([f"cluster.hosts={HOSTS}"], 3),
    ],
)
def test_world_size(overrides: list[str], size: int):
    config = compose(overrides)
    assert world_size(config) == size
    assert [plan.rank for plan in ranks(config)] == list(range(size))


def test_local_ranks_share_this_machine():
    assert ranks(compose(["cluster.ranks=3", "cluster.threads=2"]))[1:] == [
        RankPlan(1, "local", ["127.0.0.1"], 1, 3, "auto", 2),
        RankPlan(2, "local", ["127.0.0.1"], 2, 3, "auto", 2),
    ]


def test_ranks_go_host_after_host():
    config = compose([f"cluster.hosts={HOSTS}", "cluster.device=mps"])
    assert ranks(config) == [
        RankPlan(0, "a", ["127.0.0.1"], 0, 2, "cpu", "auto"),
        RankPlan(1, "a", ["127.0.0.1"], 1, 2, "cpu", "auto"),
        RankPlan(2, "b", ["127.0.0.9"], 0, 1, "mps", "auto"),
    ]


def test_the_server_is_rank_0_wherever_the_cluster_lists_it():
    config = compose(["algorithm=syncps", f"cluster.hosts={HOSTS}", "cluster.server=b"])
    assert [plan.host for plan in ranks(config)] == ["b", "a", "a"]
    hosts = config.cluster.hosts
    assert hosts is not None and [host.name for host in hosts] == ["b", "a"]
    again = validate(resolved(config))
    assert again == config


def test_who_writes_checkpoints():
    for overrides, count in (
        (["algorithm=classicdp", "cluster.ranks=3"], 3),
        (["algorithm=syncps", "cluster.ranks=3"], 3),
        (["algorithm=syncps", "cluster.ranks=3", "algorithm.straggler_timeout_s=2.0"], 1),
    ):
        assert savers(compose(overrides)) == count
