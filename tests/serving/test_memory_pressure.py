"""When a host has too little memory for one more request, and when it has enough again."""

from __future__ import annotations

import msgspec
import pytest

from smolrun.serving.memory_pressure import MemoryPressure
from smolrun.serving.messages import HostMemory, StageStats

GB = 2**30


def report(available_gb: float, *, rank: int = 0, process_gb: float = 1.0) -> HostMemory:
    return HostMemory(rank, f"mini{rank}", int(available_gb * GB), 16 * GB, int(process_gb * GB))


def low(pressure: MemoryPressure, available_gb: float, running: int = 0) -> bool:
    pressure.note(report(available_gb))
    return pressure.reason(running) is not None


def test_low_is_left_later_than_it_is_entered() -> None:
    pressure = MemoryPressure()  # 5 % of 16 GB: 0.8 GB
    assert pressure.reason(0) is None  # nothing is known
    assert [low(pressure, gb) for gb in (2.0, 0.81, 0.79, 0.81, 1.19, 1.21, 0.81)] == [
        *(False, False, True, True, True, False, False)
    ]


def test_the_sentence_names_the_host_and_both_amounts() -> None:
    pressure = MemoryPressure()
    pressure.note(report(8.0, rank=0))
    pressure.note(report(0.4, rank=1))
    assert pressure.reason(0) == (
        "mini1 has 0.4 GB of memory available, and 0.8 GB must stay free beside the answers; "
        "try again later"
    )


@pytest.mark.parametrize(("least", "expected"), [(0.0, False), (3.0, True), (1.0, False)])
def test_the_reserve_can_be_given(least: float, expected: bool) -> None:
    assert low(MemoryPressure(least), 2.0) is expected


def test_room_is_kept_for_what_running_answers_may_still_fill() -> None:
    stages = [StageStats(0, "mini0", 0, 3, cache_bytes=4 * GB)]
    pressure = MemoryPressure(1.0, stages, slots=4)
    assert not low(pressure, 2.1)  # one slot of 1 GB beside 1 GB
    assert low(pressure, 2.1, running=1)
    pressure = MemoryPressure(1.0, stages, slots=4)
    assert not low(pressure, 5.1, running=100)  # all slots, and no more
    there = msgspec.structs.replace(report(2.1), cache_grows=False)  # on a GPU, or filled already
    pressure.note(there)
    assert pressure.reason(100) is None
    pressure.note(report(2.1, process_gb=4.5))  # of which 3.5 GB are filled
    assert pressure.reason(100) is None


def test_the_stages_of_one_host_share_its_memory() -> None:
    stages = [StageStats(rank, "mini0", rank, rank, cache_bytes=4 * GB) for rank in (0, 1)]

    def is_low(available_gb: float, *hosts: str) -> bool:
        pressure = MemoryPressure(1.0, stages, slots=4)
        for rank, host in enumerate(hosts):
            found = report(available_gb, rank=rank)
            pressure.note(msgspec.structs.replace(found, host=host))
        return pressure.reason(0) is not None

    assert is_low(2.9, "mini0", "mini0")  # two slots of 1 GB beside 1 GB
    assert not is_low(3.1, "mini0", "mini0")
    assert not is_low(2.9, "mini0", "mini1")
