"""What a rank of a server tells of its host, and does for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from smolrun.launch.control import TaskMessage, task_message
from smolrun.launch.machine_memory import MachineMemory
from smolrun.serving.messages import HOSTS, HostMemory, StayAwake
from smolrun.worker import serving_host
from tests.waiting import until

GB = 2**30


class Channel:
    """What a WorkerChannel is to a watch."""

    def __init__(self) -> None:
        self.reports: list[HostMemory] = []
        self.tell: Callable[[TaskMessage], None] = lambda _: None

    def subscribe(self, topic: str, handler: Callable[[TaskMessage], None]) -> None:
        assert topic == HOSTS
        self.tell = handler

    def send_data(self, topic: str, report: HostMemory) -> None:
        assert topic == HOSTS
        self.reports.append(report)


@pytest.mark.timeout(60)
def test_it_reports_memory_and_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, switched = [MachineMemory(16 * GB, 8 * GB, 0)], []

    class Switch:
        def __enter__(self) -> Switch:
            return self

        def __exit__(self, *raised: object) -> None:
            self.set(False)

        def set(self, is_on: bool) -> None:
            if is_on != (switched[-1:] == [True]):
                switched.append(is_on)

    monkeypatch.setattr(serving_host, "AwakeSwitch", Switch)
    monkeypatch.setattr(serving_host, "machine_memory", lambda: memory[0])
    monkeypatch.setattr(serving_host, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(serving_host, "_SEND_EVERY_S", 1e6)
    start: Any = SimpleNamespace(rank=2, host="mini2")
    channel: Any = Channel()
    with serving_host.host_watched(start, channel, "cuda"):
        channel.tell(task_message(HOSTS, StayAwake(True)))
        until(lambda: switched == [True] and channel.reports)
        first = channel.reports[0]
        assert (first.rank, first.host, first.cache_grows) == (2, "mini2", False)
        assert (first.available_bytes, first.total_bytes) == (8 * GB, 16 * GB)
        assert 0 < first.process_bytes < psutil.virtual_memory().total
        memory[0] = MachineMemory(16 * GB, 7 * GB, 0)
        until(lambda: channel.reports[-1].available_bytes == 7 * GB)
        channel.tell(task_message(HOSTS, StayAwake(False)))
        until(lambda: switched == [True, False])
        channel.tell(task_message(HOSTS, StayAwake(True)))
        until(lambda: len(switched) == 3)
    assert switched == [True, False, True, False]  # the machine may sleep once the rank ends
    assert not [one for one in threading.enumerate() if one.name == "smolrun-host"]
    assert len(channel.reports) < 10  # what has not changed is not said again
