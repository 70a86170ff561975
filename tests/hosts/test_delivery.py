"""Code, data and checkpoints between a driver and hosts that are apart, over real SSH."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolrun.data.prepared import Prepared
from smolrun.errors import HostError
from smolrun.events import ShardFailed, ShardSaved
from smolrun.launch.delivery.code_archive import code_archive
from smolrun.launch.delivery.files import FileHashes, PreparedFiles
from smolrun.launch.delivery.provision import (
    ProvisionedHosts,
    ProvisionRequest,
    clear_all,
    provision,
)
from smolrun.launch.delivery.shards import ShardFetcher, ShardOrigin
from smolrun.launch.remote.machine import HostSpec, Machine
from smolrun.launch.ssh.connect import open_machines
from tests.hosts.conftest import Maker
from tests.hosts.lab import Lab
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.hosts


def open_all(lab: Lab) -> dict[str, Machine]:
    specs = [
        HostSpec(
            name=host.name,
            ssh=host.ssh,
            python=host.python,
            workdir=str(host.workdir),
            ssh_config=str(lab.ssh_config),
        )
        for host in lab.hosts
    ]
    return open_machines(specs)


@pytest.fixture
def machines(lab3: Lab) -> Iterator[dict[str, Machine]]:
    opened = open_all(lab3)
    yield opened
    for machine in opened.values():
        machine.close()


def order(
    folder: Path, text: str = "x = 1\n", prepared: Prepared | None = None
) -> ProvisionRequest:
    (folder / "my_code.py").write_text(text)
    files = PreparedFiles(prepared, FileHashes()) if prepared else None
    return ProvisionRequest("run-1", "lab", "wheel", code_archive(folder, ["my_code:build"]), files)


def some_data(folder: Path, megabytes: int) -> Prepared:
    path = folder / "data.safetensors"
    path.write_bytes(os.urandom(megabytes * 1_000_000))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Prepared("features", str(path), digest, 10, 4, None, None, 5, 5, "noise")


def timed(
    machines: dict[str, Machine], asked: ProvisionRequest
) -> tuple[ProvisionedHosts, float, int]:
    """What is ready, seconds, and bytes to all hosts together."""
    sent = 0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal sent
        sent = done

    began = time.monotonic()
    return provision(machines, asked, progress), time.monotonic() - began, sent


def test_an_edit_is_on_three_hosts_and_little_travels(
    machines: dict[str, Machine], tmp_path: Path
) -> None:
    first, first_s, _ = timed(machines, order(tmp_path))
    _, again_s, nothing = timed(machines, order(tmp_path))
    edited, edit_s, sent = timed(machines, order(tmp_path, "x = 2\n"))
    print(f"first {first_s:.2f} s, again {again_s:.2f} s, edit {edit_s:.2f} s, {sent:,} bytes")
    assert nothing == 0
    # Our code and the user's, packed, once to each host, and nothing else.
    assert sent == len(machines) * len(code_archive(tmp_path, ["my_code:build"]).pack())
    assert sent / len(machines) < 1_500_000
    assert edit_s < SOON_S
    for name, machine in machines.items():
        was, now = (ready.hosts[name].cwd for ready in (first, edited))
        for cwd, text in ((was, b"x = 1\n"), (now, b"x = 2\n")):
            assert machine.run(["cat", f"{cwd}/my_code.py"]).out == text
    assert clear_all(machines, "run-1") == []


def test_data_travels_once_to_each_host(machines: dict[str, Machine], tmp_path: Path) -> None:
    data = some_data(tmp_path, 5)
    ready, _, sent = timed(machines, order(tmp_path, prepared=data))
    assert sent >= 3 * 5_000_000
    for name, machine in machines.items():
        there = ready.hosts[name].prepared
        assert there is not None
        digest = machine.run(["sha256sum", there.path]).out.split()[0].decode()
        assert digest == data.sha256
    assert timed(machines, order(tmp_path, prepared=data))[2] == 0


def test_a_small_disk_is_told_before_anything_travels(
    machines: dict[str, Machine], lab3: Lab, tmp_path: Path
) -> None:
    data = some_data(tmp_path, 20)
    lab3.hosts[1].small_disk(64)
    try:
        with pytest.raises(HostError) as failed:
            provision(machines, order(tmp_path, prepared=data))
    finally:
        lab3.hosts[1].first_disk()
    assert str(failed.value).startswith("lab2: 20.0 MB, and 50.0 MB to spare, do not fit")
    assert "set workdir:" in str(failed.value)


def test_a_disk_that_cannot_be_written_is_told(
    machines: dict[str, Machine], lab3: Lab, tmp_path: Path
) -> None:
    lab3.hosts[2].read_only_disk()
    try:
        with pytest.raises(HostError, match=r"lab3: cannot write to .*Read-only file system"):
            provision(machines, order(tmp_path))
    finally:
        lab3.hosts[2].first_disk()


def test_a_connection_that_breaks_half_way_leaves_nothing_in_its_place(
    make_lab: Maker, tmp_path: Path
) -> None:
    lab = make_lab(hosts=1, rate="50mbit")
    (host,) = lab.hosts
    machines, data = open_all(lab), some_data(tmp_path, 20)
    begun = threading.Event()
    breaker = threading.Thread(target=lambda: begun.wait(60) and host.end_sessions())
    breaker.start()

    def progress(what: str, done: int, total: int) -> None:
        if what == "sending data" and done > 1_000_000:
            begun.set()

    with pytest.raises(HostError, match="lab1: "):
        provision(machines, order(tmp_path, prepared=data), progress)
    breaker.join(30)
    assert not (host.workdir / "files" / data.sha256).exists()
    machines["lab1"].close()
    again = open_all(lab)
    ready = provision(again, order(tmp_path, prepared=data)).hosts["lab1"]
    assert ready.prepared is not None
    assert again["lab1"].run(["sha256sum", ready.prepared.path]).code == 0
    again["lab1"].close()


def save(machine: Machine, run: str, rank: int) -> ShardSaved:
    """What a rank leaves there, and says."""
    data, name = os.urandom(3_000_000), f"rank{rank}-0.safetensors"
    part = f"{run}/checkpoints/step-00000010.part-t"
    machine.run(["mkdir", "-p", part])
    machine.put(data, f"{part}/{name}")
    files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    return ShardSaved(10, rank, {"files": files}, {}, 0.0, 0.1)


def test_shards_come_to_the_driver_and_a_lost_host_is_named(
    make_lab: Maker, tmp_path: Path
) -> None:
    lab = make_lab(hosts=2)
    machines = open_all(lab)
    ready = provision(machines, order(tmp_path)).hosts
    saved = [
        save(machine, ready[name].run, k) for k, (name, machine) in enumerate(machines.items())
    ]
    origins = {
        rank: ShardOrigin(machine, f"{ready[name].run}/checkpoints")
        for rank, (name, machine) in enumerate(machines.items())
    }
    fetcher = ShardFetcher(origins, tmp_path / "checkpoints", "t")
    fetcher.take(saved[0])
    until(lambda: fetcher.arrived() == [saved[0]], 30)
    lab.hosts[1].end_sessions()
    fetcher.take(saved[1])
    (failed,) = fetcher.finish(60)
    assert isinstance(failed, ShardFailed)
    assert "lab2: " in failed.reason
    until(lambda: not (Path(ready["lab1"].run) / "checkpoints/step-00000010.part-t").exists())
    for machine in machines.values():
        machine.close()
