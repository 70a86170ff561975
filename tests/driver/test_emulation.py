"""Hosts that play slower machines: what follows from the cluster file, and what is said of it."""

from __future__ import annotations

import os

import pytest

from smolrun.cli.compose import compose
from smolrun.config import RunConfig, ranks, resolved, validate
from smolrun.driver.preflight import emulated, start_notes
from smolrun.errors import ConfigError
from smolrun.parts.step_clock import FULL_SPEED, EmulatedPace
from smolrun.tasks.bench import drive
from smolrun.worker.process import shape_of
from smolrun.worker.train import late, pace_of

MIXES = ["pi3", "macmini3_tb", "mac_pi_laptop", "wifi4", "mix4", "mix4_shares"]


def cluster(*hosts: str) -> RunConfig:
    return compose([f"cluster.hosts=[{', '.join(hosts)}]"])


def test_one_host_may_play_another_beside_one_that_does_not() -> None:
    config = cluster("{name: a, ranks: 2}", "{name: b, emulate: {compute: 0.25, latency_ms: 4}}")
    plain = resolved(config)
    assert [pace_of(plain, rank) for rank in (0, 1)] == [FULL_SPEED] * 2
    assert isinstance(pace_of(plain, 2), EmulatedPace)
    assert [shape_of(plain, rank) is not None for rank in range(3)] == [False, False, True]
    assert emulated(config) == ["b emulates 0.25x speed, 4 ms latency"]
    assert [(plan.threads, plan.device) for plan in ranks(config)][1:] == [
        ("auto", "auto"),
        (1, "cpu"),
    ]


def test_hosts_follow_the_keys_of_the_cluster_that_they_leave_out() -> None:
    hosts = "cluster.hosts=[{name: a}, {name: b, emulate: {latency_ms: 3}}]"
    config = compose([hosts, "cluster.emulate.compute=0.5", "cluster.emulate.latency_ms=1"])
    assert emulated(config) == [
        "a emulates 0.5x speed, 1 ms latency",
        "b emulates 0.5x speed, 3 ms latency",
    ]
    assert config.cluster.emulate is None
    assert validate(resolved(config)) == config


def test_a_straggler_needs_a_pace_of_its_own_and_is_said() -> None:
    config = compose(["cluster=sim/pi3", "cluster.emulate={compute: 1, straggler_chance: 0.1}"])
    assert isinstance(pace_of(resolved(config), 1), EmulatedPace)
    assert emulated(config)[0].endswith("latency, 4x as long on 10% of steps")


def test_nothing_is_said_where_nothing_is_emulated() -> None:
    config = compose([])
    assert emulated(config) == list(start_notes(config)) == []
    assert pace_of(resolved(config), 1) is FULL_SPEED and shape_of(resolved(config), 1) is None


def test_more_than_this_machine_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    hosts = [f"{{name: h{k}, emulate: {{compute: 0.75}}}}" for k in range(3)]
    (_, warning) = start_notes(cluster(*hosts))
    assert "need 2.25 cores, this machine has 2" in warning
    assert len(list(start_notes(cluster(*hosts[:2])))) == 1


def test_a_rank_that_could_not_keep_its_pace_says_so() -> None:
    pace = EmulatedPace(0.5)
    assert late(pace, 1) is None
    pace.wanted_s, pace.late_s = 10.0, 0.4
    assert late(pace, 1) is None
    pace.late_s = 2.0
    note = late(pace, 1)
    assert note is not None and "took 20% longer" in note.message and note.rank == 1


@pytest.mark.parametrize("mix", MIXES)
def test_the_shipped_mixes_are_emulated_and_fit_on_two_cores(mix: str) -> None:
    config = compose([f"cluster=sim/{mix}"])
    hosts = config.cluster.hosts or []
    assert len(emulated(config)) == len(hosts) >= 3
    assert sum(host.emulate.compute for host in hosts if host.emulate) < 2


def test_emulated_figures_never_stand_beside_real_ones() -> None:
    with pytest.raises(ConfigError, match="would not be emulated"):
        drive(compose(["task=bench", "cluster=sim/pi3"]))
