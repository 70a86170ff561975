"""The real worker entry point and the real elastic mesh, with a stand-in for the task: every worker
sends its pid to rank 0, over and over, and rank 0 answers until it has seen `config["pids"]` of
them in all."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from smolrun.events import RankStep, StepDone
from smolrun.launch.channel import WorkerChannel
from smolrun.launch.control import StartMessage
from smolrun.mesh.mesh import Mesh, Work
from smolrun.wire.frame import Tag
from smolrun.worker import process
from tests.waiting import until

PUSHES = 20  # of each process, before it counts as seen
LARGE = 40_000


class Server:
    """Answers every push as soon as it comes; all of it on the I/O thread."""

    def __init__(self, mesh: Mesh, wanted: int, tell: Callable[[int], None]) -> None:
        self.pushes: dict[tuple[int, int], int] = {}  # by rank and pid
        self._mesh = mesh
        self._wanted = wanted
        self._tell = tell
        mesh.on_membership_change(self._news)

    @property
    def is_done(self) -> bool:
        return sum(count >= PUSHES for count in self.pushes.values()) >= self._wanted

    def _news(self, rank: int, is_here: bool, reason: str) -> None:
        if is_here:
            self._expect(rank, 0)

    def _expect(self, rank: int, number: int) -> None:
        into = torch.zeros(LARGE)

        def answer(work: Work) -> None:
            if work.error is None:
                key = (rank, int(into[0]))
                self.pushes[key] = self.pushes.get(key, 0) + 1
                self._tell(sum(self.pushes.values()))
                word = torch.full((1,), -1.0 if self.is_done else 1.0)
                self._mesh.send(rank, Tag(2, number, 0), word)
                self._expect(rank, number + 1)

        self._mesh.recv(rank, Tag(1, number, 0), into).add_done_callback(answer)


def serve(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    def tell(step: int) -> None:
        channel.emit(StepDone(step, 0.01 * step, 1.0, 1.0, 0.1, 8, 800.0, 0, 0, 0.01, 0.0))

    server = Server(mesh, start.config["pids"], tell)
    until(lambda: server.is_done or channel.stop_requested.is_set(), 50.0)
    until(lambda: not mesh.present, 20.0)  # each has its last answer
    return {"pushes": [[*key, count] for key, count in server.pushes.items()]}


def push(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    mine, answer, number = torch.full((LARGE,), float(os.getpid())), torch.zeros(1), 0
    while answer[0] >= 0:
        mesh.send(0, Tag(1, number, 0), mine).wait()
        mesh.recv(0, Tag(2, number, 0), answer).wait()
        channel.emit(RankStep(number, start.rank, 0.01, 0.0, None, 0, 0))
        number += 1
    return {"pid": os.getpid(), "number": number}


def work(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    return (serve if start.rank == 0 else push)(start, mesh, channel)


if __name__ == "__main__":
    task = types.ModuleType("smolrun.tasks.stand_in")
    task.work = work  # type: ignore[attr-defined]
    sys.modules[task.__name__] = task
    process.main()
