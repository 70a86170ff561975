"""Workers on this machine: their priority."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from smolrun.launch import local
from smolrun.launch.hosts import WorkerPlan
from smolrun.launch.local import LocalHost
from tests.launch.test_control import START


@pytest.mark.skipif(not hasattr(os, "setpriority"), reason="Windows has classes")
def test_a_worker_of_low_priority_steps_back_and_one_of_normal_does_not() -> None:
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    session = local.session_nice()
    for low in (False, True):
        worker = LocalHost(["sh", "-c", "read line"], low_priority=low).start(
            WorkerPlan(START, Path("log"))
        )
        try:
            nice = os.getpriority(os.PRIO_PROCESS, worker.pid)
            assert nice == (max(10, mine) if low else mine)
            autogroup = Path(f"/proc/{worker.pid}/autogroup")
            if autogroup.is_file():
                found = autogroup.read_text().strip()  # empty where the kernel does not use it
                wanted = f"nice {max(10, session) if low else 0}"
                assert found.endswith(wanted) or not found
        finally:
            worker.kill()
            worker.wait()


def test_windows_gets_a_class_of_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[int] = []

    def popen(*command: Any, creationflags: int, **keys: Any) -> Any:
        flags.append(creationflags)
        raise OSError("enough")

    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0x200, raising=False)
    monkeypatch.setattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0x4000, raising=False)
    monkeypatch.setattr(subprocess, "Popen", popen)
    for low in (False, True):
        with pytest.raises(OSError, match="enough"):
            LocalHost(["x"], low_priority=low).start(WorkerPlan(START, Path("log")))
    assert flags == [0x200, 0x4200]
