"""Four real processes: one comes late, one dies and comes back, one freezes, one leaves; the others
go on, and the weights are what the log says."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from smolrun.events import PushApplied
from tests.algorithms import parameter_server as ps
from tests.algorithms.edp_process import MODEL
from tests.ports import free_ports
from tests.waiting import until

WORLD = 4


class Ranks:
    """Processes, and what rank 0 has told."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self.secret = secrets.token_hex(32)
        self.rows: list[dict[str, Any]] = []
        self.parameters: dict[str, Any] = {}
        self.processes: list[subprocess.Popen[str]] = []
        self.server = self.start(0)
        threading.Thread(target=self._read, daemon=True).start()

    def start(self, rank: int, share: float = 0.1) -> subprocess.Popen[str]:
        arguments = (rank, WORLD, self.secret, self.port, share)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.algorithms.edp_process", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        assert process.stdout is not None
        if rank == 0:
            assert process.stdout.readline() == "ready\n"
        return process

    def _read(self) -> None:
        assert self.server.stdout is not None
        for line in self.server.stdout:
            row = json.loads(line)
            if "parameters" in row:
                self.parameters = row["parameters"]
            else:
                self.rows.append(row)

    def pushes(self, *ranks: int) -> int:
        rows = list(self.rows)
        return sum(row["event"] == "push" and row["rank"] in ranks for row in rows)

    def goes_on(self, *ranks: int) -> None:
        """Each of these ranks has two more gradients applied."""
        before = {rank: self.pushes(rank) for rank in ranks}
        until(lambda: all(self.pushes(r) >= n + 2 for r, n in before.items()), timeout_s=60)

    def gone(self) -> list[tuple[int, str]]:
        told = [row for row in list(self.rows) if row["event"] == "membership"]
        return [(row["rank"], row["reason"]) for row in told if not row["is_here"]]


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    for process in made.processes:
        process.kill()
        process.wait()


@pytest.mark.soak
@pytest.mark.timeout(180)
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no way to freeze a process here")
def test_ranks_come_late_die_return_freeze_and_leave(ranks: Ranks) -> None:
    first, second = ranks.start(1), ranks.start(2)
    ranks.goes_on(1, 2)
    ranks.start(3)  # late
    ranks.goes_on(1, 2, 3)
    first.kill()
    ranks.goes_on(2, 3)
    ranks.start(1)  # comes back
    ranks.goes_on(1, 2, 3)
    frozen = ranks.processes[3]
    frozen.send_signal(signal.SIGSTOP)  # for longer than silence is borne: it is lost
    until(lambda: any(rank == 3 and "silent" in why for rank, why in ranks.gone()), timeout_s=20)
    ranks.goes_on(1, 2)
    frozen.send_signal(signal.SIGCONT)
    assert frozen.wait(20) != 0, "it notices that it is out; who started it starts it again"
    second.send_signal(signal.SIGTERM)
    until(lambda: (2, "left") in ranks.gone(), timeout_s=20)
    ranks.goes_on(1)
    assert ranks.server.stdin is not None
    ranks.server.stdin.close()
    until(lambda: bool(ranks.parameters), timeout_s=20)
    assert ranks.server.wait(20) == 0
    until(lambda: ranks.processes[4].poll() == 0, timeout_s=20)  # rank 1 heard that it is over
    check_the_log(ranks)


def check_the_log(ranks: Ranks) -> None:
    rows = [row for row in ranks.rows if row["event"] == "push"]
    pushes = [PushApplied(**{k: v for k, v in row.items() if k != "event"}) for row in rows]
    tickets = [push.ticket for push in pushes]
    assert len(set(tickets)) == len(tickets), "no gradient counts twice"
    lost = {row["ticket"] for row in ranks.rows if row["event"] == "push_dropped"}
    assert lost, "who died had something in hands"
    assert all(ticket in tickets for ticket in lost if ticket < max(tickets) - 8), "it was redone"
    again = ps.replay(MODEL, pushes, WORLD - 1)
    for name, value in again.items():
        assert torch.equal(value, torch.tensor(ranks.parameters[name], dtype=value.dtype)), name
