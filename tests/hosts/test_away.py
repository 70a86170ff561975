"""driver=HOST: a host of the lab drives the run, and the box only looks at it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.lab import Lab
from tests.hosts.network import LabError
from tests.hosts.runs import SMALL, Driver, finish, workers
from tests.tasks.served import model_in
from tests.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(180)]


@pytest.fixture
def driver(lab3: Lab, tmp_path: Path) -> Iterator[Driver]:
    the_driver = Driver(lab3, tmp_path)
    yield the_driver
    first = lab3.hosts[0]
    first.kill(*[one.pid for one in first.processes() if "--driver" in one.command])
    the_driver.end()


def know_the_others(lab: Lab) -> None:
    """What the user of the first host has set up there: a key, and whom to trust."""
    folder = lab.hosts[0].home / ".ssh"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(lab.key, folder / "id_ed25519")
    (folder / "id_ed25519").chmod(0o600)
    shutil.copyfile(lab.known_hosts, folder / "known_hosts")
    names = "".join(
        f"Host {host.ssh}\n    HostName {host.address}\n    User root\n" for host in lab.hosts
    )
    (folder / "config").write_text(names)


def test_it_drives_the_others_while_the_box_may_leave(driver: Driver) -> None:
    know_the_others(driver.lab)
    # Saved at the stop only, as steps take milliseconds here.
    endless = ["training.steps=100000", "checkpoint.every=100000"]
    code, out, err = driver.run(*SMALL, "driver=lab1", *endless)
    assert code == 0, out + err
    run_id = out.split(" runs in the background")[0]
    status = driver.run("task=status")[1]
    assert f"{run_id}  running" in status
    (metrics,) = driver.lab.hosts[0].workdir.glob(f"driver/*/outputs/{run_id}/metrics.jsonl")
    until(lambda: metrics.read_text().count('"event": "step"') > 3, 60)
    assert all(workers(host) for host in driver.lab.hosts)
    code, out, err = driver.run("task=stop")
    assert code == 0, out + err
    assert "stopped (stopped by the user)" in out
    told = json.loads((driver.folder / "outputs" / run_id / "summary.json").read_text())
    assert (told["status"], told["world_size"]) == ("stopped", 3)
    until(lambda: not any(workers(host) for host in driver.lab.hosts), 20)


ASK = """
import json, sys, urllib.request
key = open(sys.argv[2]).read().strip()
body = json.dumps({"prompt": "Once", "temperature": 0, "max_tokens": 8}).encode()
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1] + "/v1/completions", body, headers)
print(json.load(urllib.request.urlopen(request, timeout=30))["choices"][0]["text"])
"""


@pytest.mark.soak  # the test above, and tests/driver/test_remote_driver.py
@pytest.mark.timeout(400)
def test_a_server_lives_there_while_the_box_is_away_and_when_it_is_cut_off(
    driver: Driver, tmp_path: Path
) -> None:
    lab = driver.lab
    first, second, third = lab.hosts
    know_the_others(lab)
    model = model_in(tmp_path / "model")
    pipeline = ["serving=pipeline", "serving.layers=[[0,1],[2,2],[3,3]]", "serving.bind=lan"]
    asked = ["task=serve", "model=hf", f"model.name={model}", *pipeline]
    code, out, err = driver.run(*asked, "driver=lab1", "detach=true")
    assert code == 0, out + err
    run_id = out.split(" runs in the background")[0]
    serves = f"{run_id}  serving at http://{first.address}:7665 on lab1"

    def ask() -> str:
        """From a host that is neither the box nor the driver."""
        key = str(first.home / ".config" / "smolrun" / "serving.key")
        return second.run(second.python, "-c", ASK, f"http://{first.address}:7665", key)

    def answers() -> str | None:
        with contextlib.suppress(LabError):
            return ask()
        return None

    until(lambda: serves in driver.run("task=status")[1], 120)
    answer = ask()
    assert answer and all(workers(host) for host in lab.hosts)
    first.cut()
    assert f"{run_id}  unreachable" in driver.run("task=status")[1]
    for task in ("attach", "stop"):
        code, out, err = driver.run(f"task={task}")
        assert code == 3 and f"lab1: {first.address} port 22" in err
    until(lambda: not workers(second) and not workers(third), 40)  # their lease has ended
    assert workers(first)  # whose layers it has are all that it needs
    first.heal()
    until(lambda: all(workers(host) for host in lab.hosts), 120)
    until(lambda: answers() == answer, 60)
    code, out, err = driver.run("task=stop")
    assert code == 0, out + err
    assert "stopped (stopped by the user): served for" in out
    for host in lab.hosts:
        until(lambda host=host: not host.processes(), 20)  # type: ignore[misc]
        assert not list(host.workdir.glob("runs/*"))


def test_a_host_that_cannot_reach_the_others_says_so(driver: Driver) -> None:
    shutil.rmtree(driver.lab.hosts[0].home / ".ssh", ignore_errors=True)
    code, out, err = finish(driver.start(*SMALL, "driver=lab1"), 90)
    assert code == 3, out + err
    assert "has to reach the other hosts over SSH by itself" in err
    assert not (driver.folder / "outputs").exists()
