"""Every rank of a run on this machine below a memory cap of its own, and the most that it held."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import psutil

from tests.launch.test_machine_memory import limited_group


class CappedRanks(contextlib.ExitStack):
    """Moves the workers of a driver into control groups of `cap` bytes each, as they appear; None:
    only looks."""

    def __init__(self, cap: int | None) -> None:
        super().__init__()
        self._cap = cap
        self.peak_pss: dict[int, int] = {}  # process id -> bytes

    def watch(self, driver: psutil.Popen, timeout_s: float) -> None:
        """Until the driver has ended; AssertionError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while driver.poll() is None:
            assert time.monotonic() < deadline, f"the run takes more than {timeout_s} s"
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in driver.children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess, OSError):
                        self._look(process)
            with contextlib.suppress(psutil.TimeoutExpired):
                driver.wait(0.1)

    def _look(self, process: psutil.Process) -> None:
        if "--worker" not in process.cmdline():
            return
        if process.pid not in self.peak_pss and self._cap is not None:
            group = self.enter_context(limited_group(self._cap, f"-{process.pid}"))
            (group / "cgroup.procs").write_text(str(process.pid))
        self.peak_pss[process.pid] = max(self.peak_pss.get(process.pid, 0), pss(process.pid))


def pss(pid: int) -> int:
    """Bytes in memory; those that several processes share are counted in part."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
