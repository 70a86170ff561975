"""The worker's entry point, as a real process: the order of its words, and every way it can end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from smolrun.events import StepDone
from smolrun.launch.control import (
    Address,
    EventMessage,
    LogMessage,
    ReadyMessage,
    ResultMessage,
    RosterMessage,
    RosterPeer,
    StopMessage,
    WorkerMessage,
    decode_from_worker,
    encode,
)
from smolrun.log_records import SEPARATOR
from tests.launch.test_control import START

SCRIPT = Path(__file__).with_name("stub_rank.py")


class Worker:
    """A worker with the test as its driver."""

    def __init__(
        self, task: str, changes: dict[str, Any] | None = None, **environment: str
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        config: dict[str, Any] = {
            "task": "train",
            "act": task,
            "cluster": {"start_timeout_s": 10.0},
            "mesh": {"kind": "tcp", "timeout_s": 300.0, "liveness": "fast", "heartbeat_ms": 250},
        }
        start = msgspec.structs.replace(
            START, rank=0, world_size=1, config=config, addresses=["127.0.0.1"]
        )
        self.say(msgspec.structs.replace(start, **changes or {}))

    def say(self, message: Any) -> None:
        self.stdin.write(encode(message))
        self.stdin.flush()

    def heard(self) -> WorkerMessage:
        return decode_from_worker(self.stdout.readline())

    def join_the_mesh(self) -> None:
        assert isinstance(self.heard(), ReadyMessage)
        self.say(RosterMessage(peers=[RosterPeer(0, "local", [Address("127.0.0.1", 4711)])]))

    def end(self) -> tuple[ResultMessage, int, str]:
        """Its result, exit code and log; its stdin stays open until it is gone."""
        messages = [decode_from_worker(line) for line in self.stdout.read().splitlines()]
        result = messages[-1]
        assert isinstance(result, ResultMessage)
        assert self.process.stderr is not None
        log = self.process.stderr.read().decode()
        return result, self.process.wait(20), log


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    started: list[Worker] = []
    yield started
    for worker in started:
        worker.process.kill()
        worker.process.communicate()


def begin(
    workers: list[Worker], task: str, changes: dict[str, Any] | None = None, **environment: str
) -> Worker:
    workers.append(Worker(task, changes, **environment))
    return workers[-1]


def test_a_rank_says_ready_then_works_then_tells_its_result(workers: list[Worker]) -> None:
    worker = begin(workers, "good")
    ready = worker.heard()
    assert isinstance(ready, ReadyMessage)
    assert (ready.rank, ready.addresses, ready.pid) == (
        0,
        [Address("127.0.0.1", 4711)],
        worker.process.pid,
    )
    assert ready.versions["torch"] == "2.0-stub"
    assert set(ready.versions) == {"python", "torch", "smolrun"}
    worker.say(RosterMessage(peers=[RosterPeer(0, "local", [Address("127.0.0.1", 4711)])]))
    event = worker.heard()
    assert isinstance(event, EventMessage)
    assert isinstance(event.data, StepDone)
    result, code, log = worker.end()
    assert (result.status, result.summary, code) == ("done", {"steps": 1}, 0)
    printed = [line for line in log.removesuffix("\n").split("\n") if SEPARATOR not in line]
    assert printed == [
        "threads 1",
        "mesh elastic=False heartbeat_s=0.25 silence_s=3.0 start_timeout_s=40.0 timeout_s=300.0 "
        "wrap=None",
        "this goes to the log good",
        "mesh closed",
    ]


@pytest.mark.parametrize(
    ("task", "kind", "message", "peer"),
    [
        ("lost", "PeerLost", "lost rank 1: silent for 10 s", 1),
        ("training_error", "TrainingError", "the loss is no number", None),
        ("defect", "ValueError", "shapes\ndo not fit", None),
        ("exit", "SystemExit", "user code calls sys.exit", None),
    ],
)
def test_an_error_becomes_a_result(
    workers: list[Worker], task: str, kind: str, message: str, peer: int | None
) -> None:
    worker = begin(workers, task)
    worker.join_the_mesh()
    result, code, log = worker.end()
    assert (result.status, code) == ("failed", 3)
    assert result.error is not None
    assert (result.error.kind, result.error.message, result.error.peer) == (kind, message, peer)
    assert "mesh closed" in log
    # A defect leaves its traceback; what we raise on purpose is one line.
    assert ("Traceback" in log) == (task in ("defect", "exit"))


@pytest.mark.parametrize("task", ["stop_requested", "was_stopped"])
def test_a_stop_is_a_good_end(workers: list[Worker], task: str) -> None:
    worker = begin(workers, task)
    worker.join_the_mesh()
    worker.say(StopMessage())
    result, code, _ = worker.end()
    assert (result.status, code) == ("stopped", 0)


def test_a_stop_before_the_roster_is_a_good_end(workers: list[Worker]) -> None:
    worker = begin(workers, "good")
    assert isinstance(worker.heard(), ReadyMessage)
    worker.say(StopMessage())
    result, code, _ = worker.end()
    assert (result.status, code) == ("stopped", 0)


def test_a_mesh_that_cannot_close_does_not_spoil_the_result(workers: list[Worker]) -> None:
    worker = begin(workers, "good", STUB_FAULT="close")
    worker.join_the_mesh()
    result, code, log = worker.end()
    assert (result.status, code) == ("done", 0)
    assert "the mesh did not close cleanly" in log


def test_a_thread_that_a_library_left_behind_does_not_keep_the_process(
    workers: list[Worker],
) -> None:
    worker = begin(workers, "thread_left_behind")
    worker.join_the_mesh()
    assert worker.end()[1] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"addresses": ["127.0.0.1", "192.0.2.1"]},
            "rank 0 on local: mesh.security = loopback_plain, but 192.0.2.1 is no loopback "
            "address; set mesh.security=tls",
        ),
        ({"security": "tls"}, "rank 0 on local: it was given no key for TLS"),
    ],
)
def test_a_rank_does_not_open_a_link_that_is_less_safe_than_it_was_told(
    workers: list[Worker], changes: dict[str, Any], words: str
) -> None:
    result, code, _ = begin(workers, "good", changes).end()
    assert (result.status, code) == ("failed", 3)
    assert result.error is not None and result.error.message == words


def test_insecure_links_are_told_to_the_user(workers: list[Worker]) -> None:
    worker = begin(workers, "good", {"security": "insecure"})
    warning = worker.heard()
    assert isinstance(warning, LogMessage) and warning.level == "warning"
    assert "can read and change what ranks send" in warning.message
    worker.join_the_mesh()
    result, _, _ = worker.end()
    assert result.status == "done"


def test_lines_of_several_threads_reach_the_log_whole() -> None:
    """Also with PYTHONUNBUFFERED, with which `print` writes each of its arguments by itself."""
    code = (
        "import sys, threading\n"
        "from smolrun.launch.channel import WorkerChannel\n"
        "WorkerChannel.take_stdio()\n"
        "def write(stream):\n"
        "    for number in range(2000):\n"
        "        print('a', 'line', 'of', 'some', 'words', file=stream)\n"
        "threads = [threading.Thread(target=write, args=(s,)) for s in (sys.stdout, sys.stderr)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert worker.stderr is not None
    with worker:  # its input stays open until it has ended
        assert worker.stderr.read().decode().splitlines() == ["a line of some words"] * 4000
