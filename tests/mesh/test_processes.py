"""Ranks as real processes with real sockets: killed, frozen, or busy with something that holds the
GIL.

A fault counts only with a pid and a TCP port in its evidence, so both are checked.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from smolrun.mesh.certificates import issue_credentials
from tests.ports import free_ports

SCRIPT = Path(__file__).with_name("rank_process.py")


@contextmanager
def ranks(
    world_size: int, silence_s: float, *extra: str
) -> Iterator[tuple[list[subprocess.Popen[str]], list[int]]]:
    ports = free_ports(world_size)
    secret = secrets.token_hex(32)
    listed = ",".join(str(port) for port in ports)
    command = [sys.executable, str(SCRIPT)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), secret, str(silence_s), listed, *extra],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    for process, credentials in zip(processes, issue_credentials("run", world_size), strict=True):
        assert process.stdin is not None
        process.stdin.write(json.dumps(dataclasses.asdict(credentials)))
        process.stdin.close()
        process.stdin = None  # communicate() would write to it
    try:
        yield processes, ports
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def next_line(process: subprocess.Popen[str], start: str) -> str:
    """The next line that begins with `start`; the test's timeout is the deadline."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line.strip()
    raise AssertionError(f"process {process.pid} ended without saying {start!r}")


def has_established_link(pid: int, ports: list[int]) -> bool:
    connections = psutil.Process(pid).net_connections("tcp")
    return any(
        c.status == "ESTABLISHED" and {c.laddr.port, c.raddr.port} & set(ports) for c in connections
    )


def error(survivor: subprocess.Popen[str], since: float, lost: int) -> tuple[float, str]:
    """How many seconds after `since` it lost that rank, and its sentence."""
    _, at, text = next_line(survivor, "error").split(" ", 2)
    assert f"lost rank {lost}" in text
    return float(at) - since, text


@pytest.mark.parametrize(
    ("security", "within_s"),
    [
        ("tls", None),
        *(pytest.param(name, 1.0, marks=pytest.mark.soak) for name in ("plain", "tls")),
    ],
)
def test_a_killed_rank_is_seen_by_its_closed_links(security: str, within_s: float | None) -> None:
    with ranks(3, 50.0, security) as (processes, ports):
        for process in processes:
            next_line(process, "step 5")
        assert has_established_link(processes[2].pid, ports)
        killed_at = time.time()
        processes[2].send_signal(signal.SIGKILL)
        seen = [error(survivor, killed_at, lost=2) for survivor in processes[:2]]
    assert not any("silent" in text for _, text in seen)
    assert within_s is None or max(seconds for seconds, _ in seen) <= within_s


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot freeze a process")
def test_a_frozen_rank_is_seen_by_its_silence() -> None:
    with ranks(3, 2.0) as (processes, ports):
        for process in processes:
            next_line(process, "step 5")
        assert has_established_link(processes[1].pid, ports)
        stopped_at = time.time()
        processes[1].send_signal(signal.SIGSTOP)
        seen = [error(processes[rank], stopped_at, lost=1) for rank in (0, 2)]
        processes[1].send_signal(signal.SIGCONT)  # it wakes to a mesh that has ended
        next_line(processes[1], "error")
    assert all(seconds > 1.0 for seconds, _ in seen)
    assert any("silent for 2" in text for _, text in seen)


def test_a_rank_that_holds_the_gil_for_two_seconds_is_not_taken_for_dead() -> None:
    with ranks(2, 10.0, "hold") as (processes, _):
        gaps = [float(next_line(process, "done gap").split()[-1]) for process in processes]
    assert gaps[1] > 0.5, "rank 1 must really have been kept from its sockets"
