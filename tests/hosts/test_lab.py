"""The lab itself: hosts that are apart, cables that break as cables do, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts import claims
from tests.hosts.conftest import Maker
from tests.hosts.lab import Lab, lab
from tests.hosts.network import LabError, command
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.hosts


ROOT = Path(__file__).resolve().parents[2]


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def traces(name: str) -> list[str]:
    """What the box still has of a lab."""
    found = [line for line in command("ip", "netns", "list").splitlines() if f"{name}-" in line]
    found += [one.name for one in Path("/sys/class/net").iterdir() if one.name == name]
    found += [line for line in command("nft", "list", "tables").splitlines() if name in line]
    return found


def test_each_host_is_reached_by_ssh_and_has_name_home_and_key_of_its_own(lab3: Lab):
    said = [lab3.run_ssh(host, "hostname; echo ~; pwd; cat") for host in lab3.hosts]
    homes = [str(host.home) for host in lab3.hosts]
    assert [one.stdout.split() for one in said] == [
        [name, home, home] for name, home in zip(("lab1", "lab2", "lab3"), homes, strict=True)
    ]
    assert len(set(homes)) == len({host.host_key() for host in lab3.hosts}) == 3


def test_hosts_reach_each_other_by_name_and_by_both_kinds_of_address(lab3: Lab):
    first, second, _ = lab3.hosts
    for address in (second.address, second.address6, "lab2"):
        probe = f"import socket; print(socket.create_connection(({address!r}, 22)).recv(4))"
        assert "b'SSH-'" in first.run(sys.executable, "-c", probe)


def test_files_go_by_sftp(lab3: Lab, tmp_path: Path):
    (tmp_path / "a").write_text("text")
    argv = ["sftp", "-F", str(lab3.ssh_config), "-b", "-", lab3.hosts[0].ssh]
    subprocess.run(argv, input=b"put %s work/b" % bytes(tmp_path / "a"), check=True, timeout=30)
    assert (lab3.hosts[0].workdir / "b").read_text() == "text"


def test_a_host_sees_its_own_processes_only_and_they_can_be_ended(lab3: Lab):
    first, second, _ = lab3.hosts
    left = first.start("sh", "-c", "setsid sleep 1234 & exec sleep 5678")
    both = {("sleep", "1234"), ("sleep", "5678")}
    until(lambda: {one.command for one in first.processes()} == both)
    assert second.processes() == []
    assert "sleep" not in second.run("sh", "-c", "cat /proc/[0-9]*/cmdline").replace("\0", " ")
    there = {one.pid_there for one in first.processes()}
    assert there <= {int(word) for word in first.run("ls", "/proc").split() if word.isdigit()}
    first.kill(*(one.pid for one in first.processes()))
    until(lambda: first.processes() == [])
    assert left.wait(20) != 0


def test_a_frozen_host_stands_still_and_goes_on(lab3: Lab):
    host = lab3.hosts[0]
    counts = "i=0; while :; do i=$((i+1)); echo $i; done > work/count"
    host.start("sh", "-c", counts)
    file = host.workdir / "count"
    until(lambda: file.exists() and file.stat().st_size > 0)
    host.freeze()
    at = file.stat().st_size
    assert lab3.run_ssh(host, "echo in").stdout == "in\n"  # SSH still answers
    assert file.stat().st_size == at
    host.thaw()
    until(lambda: file.stat().st_size > at)
    host.kill(*(one.pid for one in host.processes()))


def test_a_host_asleep_says_nothing_until_it_wakes(make_lab: Maker):
    the_lab = make_lab(hosts=1)
    host = the_lab.hosts[0]
    argv = ["ssh", "-F", str(the_lab.ssh_config), "-o", "ConnectTimeout=1", host.ssh, "true"]
    host.freeze(sshd=True)
    assert subprocess.run(argv, capture_output=True, timeout=30).returncode == 255
    host.cut()
    assert subprocess.run(argv, capture_output=True, timeout=30).returncode == 255
    host.heal()
    host.thaw()
    assert the_lab.run_ssh(host, "true").returncode == 0


def test_a_changed_and_an_unknown_host_key_are_refused(lab3: Lab):
    host = lab3.hosts[1]
    old = host.fingerprint()
    host.new_host_key()
    refused = lab3.run_ssh(host, "true")
    assert refused.returncode == 255
    assert "IDENTIFICATION HAS CHANGED" in refused.stderr
    assert host.fingerprint() in refused.stderr
    assert old not in refused.stderr
    lab3.forget(host)
    refused = lab3.run_ssh(host, "true")
    assert "Host key verification failed" in refused.stderr
    assert "CHANGED" not in refused.stderr
    lab3.write_user_files()
    assert lab3.run_ssh(host, "true").returncode == 0


def test_a_refused_key(lab3: Lab):
    host = lab3.hosts[1]
    lab3.authorize(host)
    assert "Permission denied" in lab3.run_ssh(host, "true").stderr
    lab3.authorize(host, lab3.key)
    assert lab3.run_ssh(host, "true").returncode == 0


def test_a_server_on_another_port_and_one_that_says_nothing(make_lab: Maker):
    the_lab = make_lab(hosts=1)
    host = the_lab.hosts[0]
    host.stop_sshd()
    host.start_sshd(port=2222)
    assert "Connection refused" in the_lab.run_ssh(host, "true").stderr
    the_lab.write_user_files()
    assert the_lab.run_ssh(host, "true").returncode == 0
    host.stop_sshd()
    host.start_sshd(silent=True)
    argv = ["ssh", "-F", str(the_lab.ssh_config), "-o", "ConnectTimeout=1", "lab1", "true"]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=30).stderr
    assert "banner exchange" in said
    assert "refused" not in said


def test_sessions_break_while_the_server_stays(lab3: Lab):
    host = lab3.hosts[2]
    argv = ["ssh", "-F", str(lab3.ssh_config), host.ssh, "echo in; sleep 1000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as session:
        assert session.stdout is not None
        assert session.stdout.readline() == b"in\n"
        host.end_sessions()
        assert session.wait(20) == 255
    assert lab3.run_ssh(host, "true").returncode == 0
    host.kill(*(one.pid for one in host.processes()))


def test_what_bashrc_says_comes_first(lab3: Lab):
    host = lab3.hosts[0]
    (host.home / ".bashrc").write_text("echo welcome\n")
    assert lab3.run_ssh(host, "echo in").stdout == "welcome\nin\n"
    (host.home / ".bashrc").unlink()


def test_a_full_disk_and_one_that_cannot_be_written(lab3: Lab):
    host = lab3.hosts[0]
    host.small_disk(1)
    full = lab3.run_ssh(host, "cd work && head -c 2000000 /dev/zero > file")
    assert "No space left" in full.stderr
    host.first_disk()
    host.read_only_disk()
    assert "Read-only" in lab3.run_ssh(host, "touch work/file").stderr
    host.first_disk()
    assert lab3.run_ssh(host, "touch work/file").returncode == 0


def test_a_clock_that_is_off_also_for_an_isolated_python(make_lab: Maker):
    host = make_lab(hosts=1).hosts[0]
    host.shift_clock(-3600)
    code = "import sys, time, yaml; print(time.time(), time.time_ns() / 1e9, sys.version_info[:2])"
    first, second, version = host.run(host.python, "-I", "-c", code).split(maxsplit=2)
    now = float(host.run(sys.executable, "-c", "import time; print(time.time())"))
    assert float(first) == pytest.approx(now - 3600, abs=30)
    assert float(second) == pytest.approx(now - 3600, abs=30)
    assert version.strip() == str(sys.version_info[:2])


def test_a_host_behind_another(make_lab: Maker):
    the_lab = make_lab(hosts=2)
    door, behind = the_lab.hosts
    the_lab.only_through(behind, door)
    said = the_lab.run_ssh(behind, "hostname; echo $SSH_CLIENT").stdout.split()
    assert said[:2] == ["lab2", door.address]


def test_hidden_folders_are_empty_on_hosts(make_lab: Maker, tmp_path: Path):
    (tmp_path / "secret").write_text("x")
    host = make_lab(hosts=1, hidden=[tmp_path]).hosts[0]
    assert host.run("ls", str(tmp_path)) == ""
    assert (tmp_path / "secret").exists()


def test_the_cluster_file_is_one_that_smolrun_reads(lab3: Lab, tmp_path: Path):
    lab3.write_cluster(tmp_path / "conf", "lab3", host_keys={"lab2": {"ranks": 2}}, deploy="none")
    argv = [sys.executable, "-m", "smolrun.cli", "cluster=lab3", "--cfg", "job"]
    shown = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert f"ssh_config: {lab3.ssh_config}" in shown.stdout, shown.stderr
    assert "deploy: none" in shown.stdout
    assert shown.stdout.count(f"python: {sys.executable}") == 3


def test_hosts_get_out_if_they_may(make_lab: Maker):
    the_lab = make_lab(hosts=1, internet=True)
    assert the_lab.address in the_lab.hosts[0].run("ip", "route", "get", "192.0.2.77")
    assert "masquerade" in command("nft", "list", "table", "ip", the_lab.name)
    assert claims.FORWARDING.read_text().strip() == "1"
    with pytest.raises(LabError, match="unreachable"):
        make_lab(hosts=1).hosts[0].run("ip", "route", "get", "192.0.2.77")


def test_the_end_leaves_nothing_also_after_an_error(possible: None, tmp_path: Path):
    pids = []
    options = {"hosts": 2, "folder": tmp_path, "internet": True}
    with pytest.raises(ZeroDivisionError), lab(**options) as the_lab:
        name = the_lab.name
        host = the_lab.hosts[0]
        the_lab.run_ssh(host, "setsid nohup sleep 1000 < /dev/null > /dev/null 2>&1 &")
        host.start("sleep", "2000")
        until(lambda: len(host.processes()) == 2)
        host.freeze()
        host.cut()
        pids = [one.pid for one in host.processes(sshd=True)]
        assert len(pids) == 3
        assert len(traces(name)) == 5
        began = time.monotonic()
        raise ZeroDivisionError
    assert time.monotonic() - began < SOON_S
    assert traces(name) == []
    assert not any(exists(pid) for pid in pids)


def test_what_a_killed_run_left_is_removed_and_no_other_lab(
    lab3: Lab, make_lab: Maker, tmp_path: Path
):
    code = (
        "import pathlib, sys\n"
        "from tests.hosts.lab import lab\n"
        "with lab(hosts=1, folder=pathlib.Path(sys.argv[1])) as the_lab:\n"
        "    the_lab.hosts[0].start('sleep', '1000')\n"
        "    while len(found := the_lab.hosts[0].processes(sshd=True)) < 2: pass\n"
        "    print(the_lab.name, *(one.pid for one in found), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, cwd=ROOT, **pipes, text=True) as other:
        assert other.stdout is not None
        name, *pids = other.stdout.readline().split()
        assert all(exists(int(pid)) for pid in pids)
        other.kill()
    until(lambda: not any(exists(int(pid)) for pid in pids))  # they have ended by themselves
    claim = claims.CLAIMS / f"{name.removeprefix('smol')}.json"
    make_lab(hosts=1)
    assert not claim.exists() or json.loads(claim.read_text())["pid"] != other.pid
    assert lab3.run_ssh(lab3.hosts[0], "true").returncode == 0
