"""Numbers of labs, and the box's forwarding of packets, which is as it was once all have gone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.hosts import claims

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="labs are on Linux only")
ROUTES = """default via 192.0.2.1 dev eth0
10.187.2.0/23 dev wg0 scope link
local 10.187.1.254 dev lab table local proto kernel scope host
"""


@pytest.fixture(autouse=True)
def a_box(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One without labs, whose network we only pretend to change."""
    said = {"ip -4 route show table all": ROUTES}
    monkeypatch.setattr(claims, "command", lambda *argv, data="": said.get(" ".join(argv), ""))
    monkeypatch.setattr(claims, "CLAIMS", tmp_path / "claims")
    monkeypatch.setattr(claims, "FORWARDING", tmp_path / "ip_forward")


def test_labs_take_networks_that_nobody_uses():
    taken = [claims.claim() for _ in range(3)]
    # 1 has a local address in it already, 2 and 3 are within the route of the tunnel.
    assert [one.number for one in taken] == [0, 4, 5]
    claims.release(taken[1])
    assert claims.claim() == taken[1]


def test_the_number_of_a_dead_process_is_free_again():
    network = claims.claim()
    file = claims.CLAIMS / f"{network.number}.json"
    record = json.loads(file.read_text())
    assert record["pid"] == os.getpid()
    file.write_text(json.dumps(record | {"started": record["started"] - 1}))  # another has its pid
    assert claims.claim() == network


@pytest.mark.parametrize("before", ["0\n", "1\n"])
def test_forwarding_is_on_while_a_lab_needs_it(before: str):
    claims.FORWARDING.write_text(before)
    first, second, third = (claims.claim() for _ in range(3))
    claims.let_out(first)
    claims.let_out(second)
    claims.release(first)
    claims.release(third)
    assert claims.FORWARDING.read_text().strip() == "1"
    claims.release(second)
    assert claims.FORWARDING.read_text().strip() == before.strip()
