"""All hosts of a run made ready at once, or all that cannot be are named."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from smolrun.data.prepared import Prepared
from smolrun.errors import HostError, HostErrors
from smolrun.launch.delivery import provision as module
from smolrun.launch.delivery.code_archive import code_archive
from smolrun.launch.delivery.files import FileHashes, PreparedFiles
from smolrun.launch.delivery.provision import ProvisionRequest, clear_all, provision
from tests.launch.here import HereMachine


def make_hosts(tmp_path: Path, count: int = 3) -> dict[str, Any]:
    names = [f"mini{number}" for number in range(1, count + 1)]
    return {name: HereMachine(tmp_path / name, name) for name in names}


def order(tmp_path: Path, **keys: Any) -> ProvisionRequest:
    (tmp_path / "my_code.py").write_text("WORD = 'mine'\n")
    archive = code_archive(tmp_path, ["my_code:build"])
    return ProvisionRequest("run-1", "home", keys.pop("deploy", "wheel"), archive, **keys)


def some_data(tmp_path: Path) -> Prepared:
    path = tmp_path / "data.safetensors"
    path.write_bytes(b"data" * 100)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Prepared("features", str(path), digest, 10, 4, None, None, 5, 5, "numbers")


def puts(hosts: dict[str, Any]) -> list[tuple[str, int]]:
    return [put for host in hosts.values() for put in host.puts]


def test_every_host_gets_everything_once(tmp_path: Path) -> None:
    hosts, data = make_hosts(tmp_path), some_data(tmp_path)
    told: list[tuple[str, int, int]] = []
    asked = order(tmp_path, prepared=PreparedFiles(data, FileHashes()))
    ready = provision(hosts, asked, lambda *done: told.append(done))
    assert list(ready.hosts) == ["mini1", "mini2", "mini3"]
    assert (ready.warnings, ready.notes) == ([], [])
    for name, host in ready.hosts.items():
        assert host.run == f"{hosts[name].workdir}/runs/run-1"
        assert host.prepared is not None
        assert Path(host.prepared.path).read_bytes() == b"data" * 100
        assert host.versions["smolrun"]
    assert {what for what, _, _ in told} == {"sending code", "sending data"}
    assert told[-1] == ("sending data", 1200, 1200)
    for host in hosts.values():
        host.puts.clear()
    assert provision(hosts, asked) == ready
    assert puts(hosts) == []


def test_a_worker_finds_our_code_and_the_users(tmp_path: Path) -> None:
    hosts = make_hosts(tmp_path, 1)
    hosts["mini1"].spec.env = {"PYTHONPATH": "/theirs"}
    host = provision(hosts, order(tmp_path)).hosts["mini1"]
    assert host.argv == [Path(sys.executable).as_posix(), "-P", "-m", "smolrun.cli", "--worker"]
    assert host.env["PYTHONPATH"].endswith(f"/lib{os.pathsep}/theirs")
    program = "import os, sys, smolrun.cli; print(smolrun.cli.__file__, os.listdir())"
    done = subprocess.run(
        [*host.argv[:2], "-c", program],
        env={**os.environ, **host.env},
        cwd=host.cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith(f"{hosts['mini1'].workdir}/code/")
    assert "'my_code.py'" in done.stdout


def test_with_deploy_none_nothing_of_ours_is_set(tmp_path: Path) -> None:
    hosts = make_hosts(tmp_path, 1)
    host = provision(hosts, order(tmp_path, deploy="none")).hosts["mini1"]
    assert (host.env, host.cwd) == ({}, hosts["mini1"].home)
    assert puts(hosts) == []


def test_all_bad_hosts_are_named_and_nothing_large_travels(tmp_path: Path) -> None:
    hosts, data = make_hosts(tmp_path), some_data(tmp_path)
    hosts["mini1"].spec.python = "/no/such/python"
    hosts["mini3"].spec.python = None
    with pytest.raises(HostErrors) as failed:
        provision(hosts, order(tmp_path, prepared=PreparedFiles(data, FileHashes())))
    lines = str(failed.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["mini1", "mini3"]
    assert "there is no Python /no/such/python" in lines[0]
    assert "smolrun task=setup cluster=home" in lines[1]
    assert not [path for path, _ in puts(hosts) if path.endswith(".safetensors")]


def test_versions_are_compared_over_all_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {**module.own_versions(), "torch": "1.0.0"}
    monkeypatch.setattr(module, "own_versions", lambda: own)
    ready = provision(make_hosts(tmp_path, 2), order(tmp_path))
    assert [line.partition(" has torch")[0] for line in ready.warnings] == ["mini1", "mini2"]
    monkeypatch.setattr(module, "own_versions", lambda: {**own, "smolrun": "0.0.0"})
    with pytest.raises(HostErrors, match=r"mini1: it has smolrun .*\nmini2: it has smolrun"):
        provision(make_hosts(tmp_path, 2), order(tmp_path))


def test_a_host_that_breaks_off_is_named_and_the_others_are_ready(tmp_path: Path) -> None:
    hosts = make_hosts(tmp_path)

    def cut(path: str) -> None:
        raise HostError("mini2", "connection lost")

    hosts["mini2"].before_put = cut
    with pytest.raises(HostError, match="mini2: connection lost"):
        provision(hosts, order(tmp_path))
    code = [host.workdir for host in (hosts["mini1"], hosts["mini3"])]
    assert all(len(os.listdir(f"{workdir}/code")) == 2 for workdir in code)
    assert [os.listdir(f"{host.workdir}/runs") for host in hosts.values()] == [[], [], []]


def test_after_ctrl_c_nothing_of_the_run_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts, run_on_all = make_hosts(tmp_path, 2), module.run_on_all

    def interrupted(machines: Any, act: Any, what: str) -> Any:
        if what == "files":
            raise KeyboardInterrupt
        return run_on_all(machines, act, what)

    monkeypatch.setattr(module, "run_on_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        provision(hosts, order(tmp_path))
    assert [os.listdir(f"{host.workdir}/runs") for host in hosts.values()] == [[], []]


def test_hosts_are_served_at_the_same_time(tmp_path: Path) -> None:
    hosts = make_hosts(tmp_path)
    meeting = threading.Barrier(3)
    for host in hosts.values():
        host.before_put = lambda path: meeting.wait(timeout=20)
    assert len(provision(hosts, order(tmp_path)).hosts) == 3


def test_clearing_leaves_code_and_says_what_did_not_go(tmp_path: Path) -> None:
    hosts = make_hosts(tmp_path, 2)
    ready = provision(hosts, order(tmp_path))
    assert clear_all(hosts, "run-1") == []
    assert not any(Path(host.run).exists() for host in ready.hosts.values())
    assert all(Path(host.cwd).is_dir() for host in ready.hosts.values())

    def lost(script: str, request: dict[str, Any]) -> None:
        raise HostError("mini2", "connection lost")

    hosts["mini2"].before_call = lost
    (line,) = clear_all(hosts, "run-1")
    assert "runs/run-1 could not be removed: mini2: connection lost" in line


def test_clearing_connects_again_where_the_connection_was_lost(tmp_path: Path) -> None:
    """Before or in the moment of clearing; a host that is not there any more is named."""
    hosts = make_hosts(tmp_path)
    ready = provision(hosts, order(tmp_path)).hosts
    again = make_hosts(tmp_path)  # of the same folders
    asked: list[str] = []

    def lose(name: str) -> Any:
        def lost(script: str, request: dict[str, Any]) -> None:
            hosts[name].connection.lost = "the SSH connection was lost"
            raise HostError(name, "the SSH connection was lost")

        return lost

    def open_again(machine: Any) -> Any:
        asked.append(machine.name)
        if machine.name == "mini3":
            raise HostError("mini3", "port 22 does not answer")
        return again[machine.name]

    hosts["mini2"].before_call, hosts["mini3"].before_call = lose("mini2"), lose("mini3")
    (line,) = clear_all(hosts, "run-1", open_again)
    assert sorted(asked) == ["mini2", "mini3"]
    assert [Path(host.run).exists() for host in ready.values()] == [False, False, True]
    assert line == (
        f"{ready['mini3'].run} could not be removed: mini3: port 22 does not answer; "
        "it can be deleted"
    )
