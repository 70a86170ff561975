"""task=doctor on hosts that are apart, healthy and not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.conftest import Maker
from tests.hosts.host import Host, make_key
from tests.hosts.lab import Lab
from tests.hosts.network import command
from tests.hosts.runs import Driver, assert_clean
from tests.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(150)]


def ask(driver: Driver, *overrides: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, document and what was said beside it."""
    code, out, err = driver.run("task=doctor", "doctor.format=json", *overrides, timeout_s=140.0)
    return code, json.loads(out), err


def statuses(told: dict[str, Any]) -> dict[str, str]:
    return {host["name"]: host["status"]["state"] for host in told["hosts"]}


def findings(told: dict[str, Any], name: str) -> str:
    """All sentences and commands about one host."""
    (host,) = [host for host in told["hosts"] if host["name"] == name]
    return "\n".join(f"{one['what']} -> {one['hint']}" for one in host["status"]["findings"])


def close_door(host: Host, *sources: str) -> None:
    """A firewall of the host: nobody (or none of `sources`) may open a connection to its ports."""
    who = f"ip saddr {{ {', '.join(sources)} }} " if sources else ""
    rule = f"{who}tcp dport 1024-65535 tcp flags & (syn | ack) == syn drop"
    chain = f"chain input {{ type filter hook input priority 0; {rule}; }};"
    host.run("nft", f"table inet firewall {{ {chain} }};")


def test_healthy_hosts_are_fine(lab3: Lab, tmp_path: Path):
    driver = Driver(lab3, tmp_path)
    code, told, err = ask(driver)
    assert code == told["exit_code"] == 0, err
    fine = {"lab1": "fine", "lab2": "fine", "lab3": "fine"}
    assert statuses(told) == fine, [findings(told, name) for name in fine]
    for host in told["hosts"]:
        assert host["system"]["user"] == "root"
        assert host["environment"]["packages"]["torch"]
        assert abs(host["clock"]["offset_s"]) < 1.0 + host["clock"]["uncertain_s"]
        assert host["addresses"][0] in str(host["network"]["interfaces"])
    links = {(one["from"], one["to"]): one for one in told["links"]}
    assert len(links) == 6
    # A cable of 1 Gbit/s; its bucket lets a burst through, encryption takes its share.
    assert all(1e6 < one["bytes_per_s"] < 400e6 for one in links.values())
    assert all("Ethernet" in one["over"] for one in links.values())
    # What an earlier test left may still be on its route out.
    assert_clean(lab3.hosts)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.soak
def test_a_blocked_direction_a_wrong_clock_and_a_noisy_shell(make_lab: Maker, tmp_path: Path):
    lab = make_lab(hosts=3)
    first, second, third = lab.hosts
    close_door(second, first.address)
    third.shift_clock(300.0)
    (first.home / ".bashrc").write_text("echo 'Welcome!'; echo '{\"time_s\": 0}'; echo oops >&2\n")
    driver = Driver(lab, tmp_path)
    code, told, err = ask(driver)
    assert statuses(told) == {"lab1": "fine", "lab2": "usable", "lab3": "usable"}, err
    assert code == 0
    blocked = findings(told, "lab2")
    assert "lab1 cannot reach lab2" in blocked
    assert "timed out" in blocked
    assert "the other direction works" in blocked
    assert "nft" in blocked
    assert "its clock is 300 s ahead of this machine's" in findings(told, "lab3")
    assert len(told["links"]) == 6  # lab2 dials lab1, and both directions go through that


@pytest.mark.soak
def test_a_host_that_nobody_reaches_keeps_no_other_from_being_measured(
    make_lab: Maker, tmp_path: Path
):
    lab = make_lab(hosts=3)
    second = lab.hosts[1]
    close_door(second)
    for other in (lab.hosts[0], lab.hosts[2]):
        close_door(other, second.address)
    code, told, _ = ask(Driver(lab, tmp_path))
    assert code == told["exit_code"] == 3
    assert statuses(told) == {"lab1": "fine", "lab2": "cannot run", "lab3": "fine"}
    assert "lab3 cannot reach lab2" in findings(told, "lab2")
    assert {(one["from"], one["to"]) for one in told["links"]} == {
        ("lab1", "lab3"),
        ("lab3", "lab1"),
    }


def test_hosts_that_do_not_answer_are_told_with_what_mends_it(make_lab: Maker, tmp_path: Path):
    lab = make_lab(hosts=3)
    _, second, third = lab.hosts
    lab.authorize(second)
    third.cut()
    driver = Driver(lab, tmp_path, connect_timeout_s=3)
    code, out, err = driver.run("task=doctor")
    assert code == 3, out + err
    assert "lab2: cannot run" in out
    assert "rejects the login of root" in out
    assert "lab3: cannot run" in out
    assert "does not answer" in out
    assert "task=setup" in out
    assert "lab1: fine" in out
    assert max(map(len, out.splitlines()[:12])) <= 100  # the table


@pytest.mark.soak
def test_ssh_gets_in_and_smolrun_does_not(make_lab: Maker, tmp_path: Path):
    """By an agent of ssh_config, which only the system's ssh reads."""
    lab = make_lab(hosts=1)
    (host,) = lab.hosts
    other, socket = tmp_path / "other", tmp_path / "agent"
    make_key(other)
    lab.authorize(host, other)
    text = lab.ssh_config.read_text().replace("IdentitiesOnly yes", f"IdentityAgent {socket}")
    lab.ssh_config.write_text(text)
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    try:
        until(socket.exists)
        command("env", f"SSH_AUTH_SOCK={socket}", "ssh-add", "-q", str(other))
        code, told, _ = ask(Driver(lab, tmp_path))
    finally:
        agent.terminate()
        agent.wait(20)
    assert code == 3
    assert "rejects the login of root" in findings(told, "lab1")
    assert (
        f"the system's ssh logs in, smolrun does not: ssh uses identityagent {socket}"
        in findings(told, "lab1")
    )


@pytest.mark.soak
def test_no_environment_and_no_room(make_lab: Maker, tmp_path: Path):
    lab = make_lab(hosts=2)
    lab.hosts[1].small_disk(64)
    driver = Driver(lab, tmp_path, host_keys={"lab1": {"python": None}})
    code, told, _ = ask(driver)
    assert code == 3
    assert "no environment for smolrun there yet -> smolrun task=setup cluster=lab" in findings(
        told, "lab1"
    )
    assert "0.1 GB free on the disk" in findings(told, "lab2")
