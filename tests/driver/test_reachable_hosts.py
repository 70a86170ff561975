"""Who answers after a loss: one that cannot be asked at all does not speak for the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.driver.restart import reachable_hosts
from smolrun.errors import HostError
from smolrun.launch.remote.machine import HostSpec
from smolrun.launch.ssh import connect

HOSTS = "[{name: me, address: 10.0.0.1}, {name: a, ssh: a}, {name: b, ssh: b}, {name: c, ssh: c}]"


def test_a_failure_is_no_answer_whatever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(spec: HostSpec, **limits: object) -> Any:
        if spec.name == "a":
            raise HostError("a", "is off")
        if spec.name == "b":
            raise KeyError("a reply that nobody foresaw")
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(connect, "open_machine", opened)
    assert reachable_hosts(compose([f"cluster.hosts={HOSTS}"])) == ["me", "c"]
