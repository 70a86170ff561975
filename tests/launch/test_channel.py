"""The worker's end of the control protocol, over plain pipes in this process."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import types
from collections.abc import Iterator

import pytest

from smolrun.errors import ProtocolError, StopRequested, WaitTimeout
from smolrun.events import EvalDone, RankStep
from smolrun.launch.channel import WorkerChannel
from smolrun.launch.control import (
    EXIT_ABANDONED,
    EXIT_ABORTED,
    AbortMessage,
    Address,
    ErrorReport,
    EventMessage,
    LeaseMessage,
    LogMessage,
    Message,
    ReadyMessage,
    ResultMessage,
    RosterMessage,
    RosterPeer,
    StopMessage,
    WorkerMessage,
    decode_from_worker,
    encode,
)
from tests.launch.deadline import until
from tests.launch.test_control import START


class Wires:
    """A channel, and a driver's hands at the other end of its pipes. `ended` gets the exit code."""

    def __init__(self, lease_limit_s: float) -> None:
        worker_reads, self.to_worker = os.pipe()
        self.from_worker, worker_writes = os.pipe()
        self.ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.channel = WorkerChannel(
            worker_reads, worker_writes, lease_limit_s=lease_limit_s, end_process=self.ended.put
        )
        self._fds = [worker_reads, worker_writes, self.from_worker]

    def say(self, *messages: Message) -> None:
        os.write(self.to_worker, b"".join(map(encode, messages)))

    def heard(self) -> list[WorkerMessage]:
        return [decode_from_worker(line) for line in os.read(self.from_worker, 65536).splitlines()]

    def close(self) -> None:
        self.hang_up()
        ours = {"smolrun-control", "smolrun-lease", "smolrun-clock"}
        until(lambda: not ours & {thread.name for thread in threading.enumerate()})
        for fd in self._fds:
            with contextlib.suppress(OSError):  # a test has closed it
                os.close(fd)

    def hang_up(self) -> None:
        if self.to_worker >= 0:
            os.close(self.to_worker)
        self.to_worker = -1


@pytest.fixture
def wires() -> Iterator[Wires]:
    wires = Wires(lease_limit_s=60.0)
    yield wires
    wires.close()


def test_start_and_roster_arrive_in_their_turn(wires: Wires) -> None:
    peers = [RosterPeer(0, "local", [Address("::1", 4000)])]
    wires.say(START, LeaseMessage(), RosterMessage(peers=peers))
    assert wires.channel.wait_start(5.0) == START
    assert wires.channel.wait_membership(5.0) == RosterMessage(peers=peers)
    assert not wires.channel.stop_requested.is_set()


def test_everything_said_arrives_whole_from_several_threads(wires: Wires) -> None:
    wires.say(START)
    wires.channel.wait_start(5.0)
    wires.channel.ready([Address("::1", 4000)], {"python": "3"})
    wires.channel.log("info", "hello")
    threads = [
        threading.Thread(target=wires.channel.emit, args=(RankStep(step, 1, 0.1, 0.0, None, 0, 0),))
        for step in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    wires.channel.emit(EvalDone(8, 1.0, 8))  # true of the whole run: rank 0 sends it
    wires.channel.result("failed", error=ErrorReport("E", "m"), summary={"steps": 3})
    ready, log, *events, result = wires.heard()
    assert ready == ReadyMessage(
        rank=1, addresses=[Address("::1", 4000)], pid=os.getpid(), versions={"python": "3"}
    )
    assert log == LogMessage(level="info", message="hello")
    assert sorted(event.data.step for event in events if isinstance(event, EventMessage)) == [
        *range(8)
    ]
    assert result == ResultMessage(
        status="failed", error=ErrorReport("E", "m"), summary={"steps": 3}
    )
    assert RankStep(0, 1, 0.1, 0.0, None, 0, 0) in [
        e.data for e in events if isinstance(e, EventMessage)
    ]


def test_a_stop_is_passed_on_also_to_those_who_ask_later(wires: Wires) -> None:
    calls: queue.SimpleQueue[str] = queue.SimpleQueue()
    wires.channel.on_stop(lambda: calls.put("early"))
    assert calls.empty()
    wires.say(StopMessage())
    assert calls.get(timeout=5.0) == "early"
    wires.channel.on_stop(lambda: calls.put("late"))
    assert calls.get_nowait() == "late"
    assert calls.empty()


def test_the_first_stop_is_a_wish_and_the_second_an_order(wires: Wires) -> None:
    wires.say(StopMessage())
    assert wires.channel.stop_requested.wait(5.0)
    assert wires.ended.empty()
    wires.say(StopMessage())
    assert wires.ended.get(timeout=20) == EXIT_ABORTED


def test_abort_ends_at_once(wires: Wires) -> None:
    wires.say(AbortMessage())
    assert wires.ended.get(timeout=20) == EXIT_ABORTED


def test_the_end_of_the_input_ends_the_worker(
    wires: Wires, capfd: pytest.CaptureFixture[str]
) -> None:
    wires.hang_up()
    assert wires.ended.get(timeout=20) == EXIT_ABANDONED
    assert capfd.readouterr().err == (
        "smolrun worker ends: the driver is gone: it closed this worker's input\n"
    )


@pytest.mark.parametrize("line", [b"hello\n", b'{"type":"ready"}\n', b"\xff\n"])
def test_a_line_that_is_no_message_ends_the_worker(wires: Wires, line: bytes) -> None:
    os.write(wires.to_worker, line)
    assert wires.ended.get(timeout=20) == EXIT_ABANDONED


def test_a_driver_that_hears_nothing_any_more_ends_the_worker(wires: Wires) -> None:
    os.close(wires.from_worker)
    wires.channel.emit(EvalDone(1, 1.0, 8))
    assert wires.ended.get(timeout=20) == EXIT_ABANDONED


def test_silence_ends_the_worker_and_leases_keep_it() -> None:
    wires = Wires(lease_limit_s=1.0)
    for _ in range(5):
        with pytest.raises(queue.Empty):
            wires.ended.get(timeout=0.25)
        wires.say(LeaseMessage())
    assert wires.ended.get(timeout=20) == EXIT_ABANDONED
    wires.close()


def test_a_jump_of_the_clock_is_no_silence_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    jump_s = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + jump_s[0])
    monkeypatch.setattr("smolrun.launch.channel.time", clock)
    wires = Wires(lease_limit_s=2.0)
    jump_s[0] = 3600.0
    with pytest.raises(queue.Empty):  # this process was frozen, or the laptop asleep
        wires.ended.get(timeout=0.4)
    assert wires.ended.get(timeout=20) == EXIT_ABANDONED
    wires.close()


def test_waiting_has_a_deadline(wires: Wires) -> None:
    with pytest.raises(WaitTimeout, match=r"waited 0\.05 s for the driver to say what to run"):
        wires.channel.wait_start(0.05)


def test_a_stop_ends_the_wait_for_the_start(wires: Wires) -> None:
    wires.say(StopMessage())
    with pytest.raises(StopRequested):
        wires.channel.wait_start(5.0)


def test_messages_out_of_turn_are_refused(wires: Wires) -> None:
    wires.say(RosterMessage(peers=[]), START)
    with pytest.raises(ProtocolError, match="before start"):
        wires.channel.wait_start(5.0)
    with pytest.raises(ProtocolError, match="instead of the roster"):
        wires.channel.wait_membership(5.0)


def test_its_threads_have_names(wires: Wires) -> None:
    until(lambda: {"smolrun-control", "smolrun-lease"} <= {t.name for t in threading.enumerate()})
