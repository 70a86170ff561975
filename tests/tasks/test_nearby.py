"""What task=nearby shows, and the remembered machines of task=trust."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from smolrun.cli.compose import compose
from smolrun.errors import ConfigError
from smolrun.launch.nearby.discovery import NOTHING_FOUND, NearbyService, key_hint
from smolrun.launch.nearby.machine_key import MachineKey
from smolrun.launch.nearby.remembered import RememberedMachines
from smolrun.tasks import nearby, trust

KEYS = [MachineKey.make().fingerprint for _ in range(3)]


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RememberedMachines:
    """Those of an account that starts without any."""
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / name)
    return RememberedMachines()


def cluster(name: str, number: int, key: str = "") -> NearbyService:
    return NearbyService(
        role="coordinator",
        name=name,
        machine=f"anna@mini{number}",
        port=4711,
        key=key and key_hint(key),
        ranks=3,
        present=1,
        id=f"0000000{number}",
        smolrun="0.1.0",
        addresses=(f"10.0.0.{number}", "fd00::1"),
    )


class Found:
    """A Browser that has found these."""

    def __init__(self, *found: NearbyService, problem: str | None = None) -> None:
        self.found = list(found)
        self.problem = problem

    def __call__(self) -> Found:
        return self

    def __enter__(self) -> Found:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_for(self, is_enough: object, timeout_s: float) -> Sequence[NearbyService]:
        assert timeout_s == 3.0
        return self.found


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: Found) -> str:
    monkeypatch.setattr(nearby, "Browser", found)
    assert nearby.drive(compose(["task=nearby"])) == 0
    return capsys.readouterr().out


def test_clusters_and_machines_and_who_needs_no_code(known, monkeypatch, capsys):
    known.add("coordinator", "anna@mini2", KEYS[0])
    known.add("joiner", "bob@pi", KEYS[1])
    waiting = NearbyService(
        role="joiner",
        name="pi",
        machine="bob@pi5",
        port=0,
        key=key_hint(KEYS[1]),
        addresses=("10.0.0.9",),
        smolrun="0.1.0",
    )
    found = Found(cluster("home", 1), cluster("office", 2, KEYS[0]), waiting)
    lines = shown(monkeypatch, capsys, found).splitlines()
    assert lines[1].split("  ")[0] == "home"
    assert "1 of 3" in lines[1]
    assert "10.0.0.1 port 4711" in lines[1]
    assert lines[1].endswith("by its code")
    assert lines[2].endswith("without a code")
    assert lines[3] == "smolrun task=join join.name=home"
    assert lines[6].split() == ["bob@pi5", "10.0.0.9", "0.1.0", "bob@pi"]


def test_a_key_that_is_remembered_in_the_other_role_needs_a_code(known, monkeypatch, capsys):
    known.add("joiner", "anna@mini2", KEYS[0])
    out = shown(monkeypatch, capsys, Found(cluster("office", 2, KEYS[0])))
    assert "by its code" in out


def test_of_two_of_one_name_the_id_says_which(known, monkeypatch, capsys):
    out = shown(monkeypatch, capsys, Found(cluster("home", 1), cluster("home", 2)))
    assert "join.name=00000001" in out


def test_a_name_that_a_shell_would_obey_is_in_no_command(known, monkeypatch, capsys):
    out = shown(monkeypatch, capsys, Found(cluster("x;reboot $(y)", 1)))
    assert "join.name=NAME\n" in out


def test_nothing_found_says_what_may_be_in_the_way(known, monkeypatch, capsys):
    assert shown(monkeypatch, capsys, Found()).strip() == NOTHING_FOUND
    out = shown(monkeypatch, capsys, Found(problem="multicast DNS does not work here: x"))
    assert out.strip() == "multicast DNS does not work here: x"


def test_trust_shows_and_forgets(known, capsys):
    known.add("joiner", "bob@pi", KEYS[0])
    known.add("coordinator", "anna@mini", KEYS[1])
    known.add("joiner", "bob@pi", KEYS[2])  # another of that name
    assert trust.drive(compose(["task=trust"])) == 0
    out = capsys.readouterr().out
    assert all(key in out for key in KEYS)
    assert "anna@mini       runs its code here" in out
    assert trust.drive(compose(["task=trust", "trust.forget=bob@pi"])) == 0
    assert [one.name for one in known.all()] == ["anna@mini"]
    with pytest.raises(ConfigError, match="no nearby machine of that name"):
        trust.drive(compose(["task=trust", "trust.forget=bob@pi"]))
    assert trust.drive(compose(["task=trust", f"trust.forget='{KEYS[1]}'"])) == 0
    assert known.all() == []
    assert trust.drive(compose(["task=trust", "trust.forget=all"])) == 0  # already true
