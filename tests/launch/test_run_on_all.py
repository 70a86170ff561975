from __future__ import annotations

import _thread
import threading
import time

import pytest

from smolrun.errors import HostError, HostErrors
from smolrun.launch.run_on_all import run_on_all
from tests.waiting import SOON_S


def test_all_work_at_the_same_time_and_answer_in_order() -> None:
    meeting = threading.Barrier(3)

    def act(number: int) -> int:
        meeting.wait(timeout=20)  # breaks if they come one after the other
        return number * 10

    assert list(run_on_all({"c": 3, "a": 1, "b": 2}, act, "test").items()) == [
        ("c", 30),
        ("a", 10),
        ("b", 20),
    ]
    assert run_on_all({}, act, "test") == {}


def test_every_machine_that_failed_is_named() -> None:
    def act(name: str) -> None:
        if name == "good":
            return
        if name == "odd":
            raise ValueError("never seen")
        raise HostError(name, "has no disk", "buy one")

    with pytest.raises(HostErrors) as failed:
        run_on_all({"bad": "bad", "good": "good", "odd": "odd"}, act, "test")
    assert str(failed.value) == "bad: has no disk; buy one\nodd: ValueError: never seen"
    with pytest.raises(HostError) as one:
        run_on_all({"bad": "bad", "good": "good"}, act, "test")
    assert one.value.host == "bad"


def test_threads_are_named_after_machine_and_work() -> None:
    named = run_on_all({"mini2": None}, lambda _: threading.current_thread().name, "code")
    assert named == {"mini2": "smolrun-mini2-code"}


def test_ctrl_c_does_not_wait_for_a_machine_that_hangs() -> None:
    release = threading.Event()

    def act(name: str) -> None:
        _thread.interrupt_main()
        release.wait(30)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_on_all({"mini1": "mini1"}, act, "test")
    assert time.monotonic() - began < SOON_S
    release.set()
