"""Machines of the lab as the launcher opens them, with a short deadline and the lab's own files."""

from __future__ import annotations

import time

import pytest

from smolrun.errors import HostError
from smolrun.launch.remote.machine import HostSpec, Machine
from smolrun.launch.ssh.connect import open_machine
from tests.hosts.host import Host
from tests.hosts.lab import Lab

TIMEOUT_S = 3.0


def spec(the_lab: Lab, host: Host, **changes: object) -> HostSpec:
    keys: dict = {"name": host.name, "ssh": host.ssh, "python": host.python}
    keys |= {"workdir": str(host.workdir), "ssh_config": str(the_lab.ssh_config)}
    return HostSpec(**keys | {"timeout_s": TIMEOUT_S} | changes)


def opened(the_lab: Lab, host: Host, **changes: object) -> Machine:
    return open_machine(spec(the_lab, host, **changes))


def refused(the_lab: Lab, host: Host, **changes: object) -> tuple[str, float]:
    """The sentence with which that host cannot be used, and the seconds it took."""
    began = time.monotonic()
    with pytest.raises(HostError) as caught:
        opened(the_lab, host, **changes)
    assert caught.value.host == host.name
    return str(caught.value), time.monotonic() - began
