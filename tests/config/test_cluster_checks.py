"""Rules about the machines of a run: what is refused before any of them is asked."""

from __future__ import annotations

from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.config import resolved, validate
from smolrun.errors import ConfigError
from tests.config.test_validate import changed, problems


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    return resolved(compose([]))


@pytest.mark.parametrize(
    ("changes", "key", "what"),
    [
        (
            {"cluster__hosts": [{"name": "a", "ssh": "a"}, {"name": "b"}]},
            "cluster.hosts[1].address = null",
            "b is this machine",
        ),
        (
            {"cluster__hosts": [{"name": n, "ssh": "a.local", "address": n} for n in "ab"]},
            "cluster.hosts = a.local",
            "2 hosts have this ssh (a, b)",
        ),
        (
            {"cluster__hosts": [{"name": n, "ssh": n, "address": "10.0.0.1"} for n in "ab"]},
            "cluster.hosts = 10.0.0.1",
            "2 hosts have this address (a, b)",
        ),
        (
            {"cluster__hosts": [{"name": "a", "ssh": "-oProxyCommand=x"}]},
            "cluster.hosts[0].ssh = -oProxyCommand=x",
            "begins with a dash",
        ),
        (
            {"cluster__hosts": [{"name": "a", "ssh": "a", "env": {"A B": "1"}}]},
            "cluster.hosts[0].env.A B = 1",
            "cannot be set",
        ),
        (
            {"cluster__hosts": [{"name": "a", "ssh": "a", "env": {"A": "1\n2"}}]},
            "cluster.hosts[0].env.A = 1 2",
            "a value of one line",
        ),
        (
            {"cluster__hosts": [{"name": "a", "ranks": 3}], "cluster__ports": "40000-40001"},
            "cluster.ports = 40000-40001",
            "at least 3 of the ports",
        ),
        (
            {"cluster__hosts": [{"name": "a", "python": "/usr/bin/python3"}]},
            "cluster.hosts[0].python = /usr/bin/python3",
            "a is this machine",
        ),
        ({"driver": "pi"}, "driver = pi", "no host of cluster=local"),
        (
            {"cluster__emulate": {"compute": 0.5}},
            "cluster.emulate.compute = 0.5",
            "there are no cluster.hosts",
        ),
        (
            {
                "cluster__hosts": [{"name": "a", "emulate": {"compute": 0.2}}],
                "cluster__emulate": {"compute": 0.5, "latency_ms": 1.0},
            },
            "cluster.emulate.compute = 0.5",
            "every host has its own",
        ),
        (
            {"cluster__restart": {"max": 1, "wait_s": 1.0, "min_hosts": 2}},
            "cluster.restart.min_hosts = 2",
            "1 to 1",
        ),
        (
            {
                "cluster__hosts": [{"name": "a", "ssh": "a"}],
                "mesh__security": "loopback_plain",
            },
            "mesh.security = loopback_plain",
            "without encryption",
        ),
    ],
)
def test_what_is_refused(shipped: dict[str, Any], changes: dict[str, Any], key: str, what: str):
    (line,) = problems(shipped, **changes)
    assert line.startswith(f"{key}: ")
    assert what in line


def test_insecure_links_between_hosts_are_a_choice(shipped: dict[str, Any]):
    hosts = [{"name": "a", "ssh": "a"}]
    for security in ("insecure", "tls", "auto"):
        data = changed(shipped, cluster__hosts=hosts, mesh__security=security)
        assert validate(data).mesh.security == security


def test_memory_of_the_cluster_is_that_of_every_host_without_its_own(shipped: dict[str, Any]):
    hosts = [{"name": "a"}, {"name": "b", "memory_gb": 3.0}]
    config = validate(changed(shipped, cluster__hosts=hosts, cluster__memory_gb=8.0))
    assert [host.memory_gb for host in config.cluster.hosts or []] == [8.0, 3.0]


ELSEWHERE = "cluster.hosts=[{name: a, ssh: a, address: 10.0.0.1}, {name: b, ssh: b}]"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([ELSEWHERE], "mesh.security = auto: a, b would be reached over a network"),
        ([ELSEWHERE, "mesh.security=loopback_plain"], "mesh.security = loopback_plain: a, b"),
        (["mesh.security=tls"], "mesh.security = tls: no such choice"),
        (["cluster.ports=40000-40100"], "cluster.ports = 40000-40100: mesh=torch listens on ports"),
        (
            ["cluster.hosts=[{name: a, emulate: {latency_ms: 4}}]"],
            "cluster.hosts[0].emulate = a: mesh=torch cannot slow links down",
        ),
        (["algorithm=edp"], "mesh = torch: ranks of algorithm=edp join and leave during a run"),
        (["task=doctor"], "mesh = torch: task=doctor has links that break and are made again"),
        (["mesh.liveness=fast"], "mesh.liveness = fast: no such key"),
    ],
)
def test_what_torch_distributed_cannot_do(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["mesh=torch", *words])
    assert [one for one in caught.value.problems if one.startswith(line)], caught.value.problems


def test_torch_distributed_between_machines_is_asked_for() -> None:
    config = compose(["mesh=torch", ELSEWHERE, "mesh.security=insecure"])
    assert config.mesh.security == "insecure"
