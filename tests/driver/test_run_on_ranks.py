"""Hosts that are away at the start of an elastic run or in the midst of it: begun without, reached
again, equipped, and put to work. The other machine is this one, without SSH."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.config import RunConfig
from smolrun.driver import fleet
from smolrun.driver.fleet import open_fleet
from smolrun.driver.run_on_ranks import Reconnector, plan_workers
from smolrun.errors import HostError, HostErrors
from smolrun.events import Event, Note, RankStep
from smolrun.launch.delivery import provision
from smolrun.launch.driver import Driver
from smolrun.launch.elastic_worker import Elasticity
from smolrun.launch.local import LocalHost
from smolrun.launch.remote.machine import HostSpec, Machine
from smolrun.launch.remote.shell import Shell
from smolrun.launch.ssh import connect
from smolrun.launch.supervisor import Limits
from smolrun.tracking.run_folder import RunFolder
from tests.launch.connection_here import ConnectionHere
from tests.launch.test_driver import has_steps, run_while
from tests.launch.tiny_driver import WORKER, Listener
from tests.waiting import until

STOP = "the test is over"
HOSTS = "[{name: here, address: 10.0.0.1}, {name: mini, ssh: mini}, {name: pi, ssh: pi}]"


class Elsewhere:
    """The two other hosts: who of them answers, and the connections there were."""

    def __init__(self, folder: Path) -> None:
        self.there = {"mini", "pi"}
        self.connections: list[ConnectionHere] = []
        self.equipped: list[str] = []
        self._folder = folder

    def open(self, spec: HostSpec, **limits: object) -> Machine:
        if spec.name not in self.there:
            raise HostError(spec.name, "nobody answers", "is it on?")
        connection = ConnectionHere(name=spec.name)
        self.connections.append(connection)
        folder = str(self._folder)
        return Machine(spec, connection, Shell.POSIX, "linux", folder, folder)

    def provision(self, machines: dict[str, Machine], order: Any, progress: Any = None) -> Any:
        self.equipped += machines
        folder = str(self._folder)
        ready = provision.ProvisionedHost(WORKER, {}, folder, folder, {})
        hosts = dict.fromkeys(machines, ready)
        return SimpleNamespace(hosts=hosts, warnings=[], notes=[])


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Elsewhere(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(connect, "open_machine", made.open)
    monkeypatch.setattr(provision, "provision", made.provision)
    yield made
    for connection in made.connections:
        connection.end_all()


def config(*algorithm: str) -> RunConfig:
    chosen = algorithm or ("algorithm=edp", "algorithm.min_ranks=2")
    return compose([*chosen, f"cluster.hosts={HOSTS}", "mesh.security=insecure"])


def notes(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Note)]


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def driver(
    elsewhere: Elsewhere, events: list[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Driver]:
    """Makes one as task=train does, with tiny workers that never come to an end by themselves."""
    tiny = {"folder": str(tmp_path), "behave": {}, "steps": 1_000_000}
    monkeypatch.setenv("TINY_CONFIG", json.dumps(tiny))
    monkeypatch.setattr(fleet, "LocalHost", lambda **_: LocalHost(WORKER))

    def make() -> Driver:
        opened = open_fleet(config())
        opened.equip("run", None, None, progress=lambda *_: None, say=lambda line: None)
        run = RunFolder.create(tmp_path / "outputs", "run", now=datetime.now())
        comings = Reconnector(config(), opened, None, lambda line: events.append(Note("x", line)))
        return Driver(
            plan_workers(config(), run, opened),
            comings.place,
            [comings, Listener(events)],
            limits=Limits(start_s=20.0, lease_every_s=0.2),
            stop_requests=lambda: int(STOP in notes(events)),
            elastic=Elasticity(min_ranks=2, ask_s=0.1, first_pause_s=0.1, farewell_s=2.0),
        )

    return make


def test_a_host_that_is_away_at_the_start_joins_when_it_answers(
    elsewhere: Elsewhere, driver: Callable[[], Driver], events: list[Event]
) -> None:
    elsewhere.there = {"mini"}

    def come() -> None:
        until(lambda: has_steps(events, 0) and has_steps(events, 1))
        assert not has_steps(events, 2, 1)
        elsewhere.there.add("pi")
        until(lambda: has_steps(events, 2))
        events.append(Note("x", STOP))

    outcome = run_while(driver().run, come)
    assert (outcome.status, outcome.exit_code) == ("stopped", 130)
    assert elsewhere.equipped == ["mini", "pi"]
    told = notes(events)
    assert "warning: pi: nobody answers; is it on?; the run begins without it" in told
    assert sum("rank 2 on pi could not be started" in line for line in told) == 1
    assert any(line.startswith("rank 2 on pi is back after") for line in told)
    assert [(row["rank"], row["away_s"] > 0) for row in outcome.departures] == [(2, True)]


def test_a_host_that_goes_away_is_reached_and_equipped_again(
    elsewhere: Elsewhere, driver: Callable[[], Driver], events: list[Event]
) -> None:
    def go_and_come() -> None:
        until(lambda: all(has_steps(events, rank) for rank in range(3)))
        elsewhere.there.discard("mini")
        (lost,) = [one for one in elsewhere.connections if one.name == "mini"]
        lost.lose("the SSH connection was lost (no answer for 15 s)")
        until(lambda: any("mini: nobody answers" in line for line in notes(events)))
        before = sum(isinstance(event, RankStep) and event.rank == 1 for event in events)
        assert not any("rank 2" in line for line in notes(events))
        elsewhere.there.add("mini")
        until(lambda: has_steps(events, 1, before + 3))
        events.append(Note("x", STOP))

    outcome = run_while(driver().run, go_and_come)
    assert (outcome.status, outcome.exit_code) == ("stopped", 130)
    assert elsewhere.equipped == ["mini", "pi", "mini"]
    told = [line for line in notes(events) if "rank 1" in line]
    assert "is out of reach" in told[0] and "rank 1 is tried again until it answers" in told[0]
    assert told[1].startswith("rank 1 on mini is back after")
    assert len(told) == 2


@pytest.mark.parametrize(
    ("there", "names"), [(set(), "mini: nobody answers.*pi"), ({"mini"}, "pi")]
)
def test_a_run_that_needs_more_hosts_than_answer_is_refused(
    there: set[str], names: str, elsewhere: Elsewhere
) -> None:
    elsewhere.there = there
    least = 3 if there else 2
    with pytest.raises((HostError, HostErrors), match=f"(?s){names}: nobody answers"):
        open_fleet(config("algorithm=edp", f"algorithm.min_ranks={least}"))


def test_a_run_that_is_not_elastic_needs_all_hosts(elsewhere: Elsewhere) -> None:
    elsewhere.there = {"mini"}
    with pytest.raises(HostError, match="pi: nobody answers"):
        open_fleet(config("algorithm=classicdp"))
