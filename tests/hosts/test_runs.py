"""Training on hosts that are apart: the same result as here, and nothing left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.lab import Lab
from tests.hosts.runs import SMALL, Driver, assert_clean, finish, workers
from tests.hosts.tap import Tap
from tests.waiting import SOON_S, until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(150)]

EVERYTHING_OF_A_RUN = ["config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "logs"]


@pytest.fixture
def driver(lab3: Lab, tmp_path: Path) -> Iterator[Driver]:
    the_driver = Driver(lab3, tmp_path)
    yield the_driver
    the_driver.end()


def losses(driver: Driver) -> list[float]:
    return [row["loss"] for row in driver.rows("step")]


def test_hosts_apart_learn_the_same_as_ranks_here(driver: Driver) -> None:
    precise = [*SMALL, "precision=float64", "training.check_replicas=true"]
    code, out, err = driver.run(*precise)
    assert code == 0, out + err
    there = losses(driver)
    hashes = [row["hashes"] for row in driver.rows("replica_hash")]
    assert len(hashes) == 20
    assert all(len(found) == 3 and len(set(found)) == 1 for found in hashes)
    found = {path.name for path in driver.latest.iterdir()}
    assert set(EVERYTHING_OF_A_RUN) <= found
    logs = sorted(path.name for path in (driver.latest / "logs").glob("*.log"))
    assert logs == ["rank0-lab1.log", "rank1-lab2.log", "rank2-lab3.log"]
    assert set(driver.summary["host_versions"]) == {"lab1", "lab2", "lab3"}
    newest = json.loads((driver.latest / "checkpoints/step-00000020/manifest.json").read_text())
    assert newest["world_size"] == 3
    assert_clean(driver.lab.hosts)

    code, out, err = driver.run(*precise, "cluster.ranks=3", cluster="local")
    assert code == 0, out + err
    assert losses(driver) == pytest.approx(there, abs=1e-12)


@pytest.mark.soak
def test_a_run_goes_on_with_fewer_hosts(driver: Driver) -> None:
    code, out, err = driver.run(*SMALL, "training.steps=10")
    assert code == 0, out + err
    driver.lab.write_cluster(driver.folder / "conf", "two", hosts=driver.lab.hosts[:2])
    resume = ["checkpoint.resume=latest", "training.steps=20"]
    code, out, err = driver.run(*resume, cluster="two")
    assert code == 0, out + err
    assert driver.summary["world_size"] == 2
    assert [row["step"] for row in driver.rows("step")] == list(range(20))


@pytest.mark.parametrize("security", ["auto", pytest.param("insecure", marks=pytest.mark.soak)])
def test_what_travels_between_hosts_is_encrypted(driver: Driver, security: str) -> None:
    """Listens to a cable: the first words of the mesh are JSON that names the run's channels."""
    with Tap(driver.lab.hosts[0]) as tap:
        code, out, err = driver.run(
            *SMALL, "training.steps=2", "checkpoint=none", f"mesh.security={security}"
        )
    assert code == 0, out + err
    assert tap.num_bytes > 1_000_000
    assert (b'"type": "hello"' in tap.beginnings) == (security == "insecure")


def test_no_worker_outlives_a_driver_that_is_killed(driver: Driver) -> None:
    run = driver.start(*SMALL, "training.steps=100000")
    driver.wait_for_step(3)
    assert all(len(workers(host)) == 1 for host in driver.lab.hosts)
    run.kill()
    until(lambda: not any(workers(host) for host in driver.lab.hosts), SOON_S)
    finish(run)


def test_ctrl_c_stops_all_hosts_at_an_agreed_step(driver: Driver) -> None:
    # Saved at the stop only: its steps take milliseconds, and a save that comes sooner than the one
    # before is fetched would be refused.
    run = driver.start(*SMALL, "training.steps=100000", "checkpoint.every=100000")
    driver.wait_for_step(3)
    run.send_signal(2)
    code, out, err = finish(run)
    assert code == 130, out + err
    assert driver.summary["status"] == "stopped"
    assert f"step-{driver.summary['steps']:08d}" == driver.summary["checkpoint"]
    assert_clean(driver.lab.hosts)


def test_a_secret_of_the_driver_is_found_nowhere(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "canary-6f1c9e0b7d"
    monkeypatch.setenv("HF_TOKEN", canary)
    monkeypatch.setenv("WANDB_API_KEY", canary)
    monkeypatch.setenv("MY_PASSWORD", canary)
    run = driver.start(*SMALL, "training.steps=100000")
    driver.wait_for_step(3)
    seen = [
        " ".join(process.command) + " " + _environment(process.pid).decode()
        for host in driver.lab.hosts
        for process in host.processes(sshd=True)
    ]
    assert len(seen) >= 6
    assert not any(canary in text for text in seen)
    # What the driver mints goes over stdin: 64 hex digits, or a key as PEM, would be it.
    words = [word for text in seen for word in re.split(r"[\s=\0]", text)]
    assert not [word for word in words if len(word) >= 64 and _is_hex(word)]
    assert not any("PRIVATE KEY" in text for text in seen)
    run.send_signal(2)
    code, out, err = finish(run)
    assert code == 130, out + err
    assert canary not in out + err
    places = [driver.folder, *(host.home for host in driver.lab.hosts)]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert len(files) > 100
    holding = [path for path in files if canary.encode() in path.read_bytes()]
    assert holding == []


def _environment(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _is_hex(word: str) -> bool:
    return all(letter in "0123456789abcdef" for letter in word)
