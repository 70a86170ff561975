"""What all tests stand on."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

# Ranks are threads of one process in most tests, and several tests run side by side: if every rank
# had all cores, they would wait for each other's threads. It has to be said before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_sessionstart() -> None:
    """Let Ctrl-C mean something again, also for the processes that tests start.

    A shell that runs the tests in the background has them ignore it, and they hand that down.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _as_nice_as_workers()
    if hasattr(signal, "SIGHUP"):  # nohup ignores it, and children inherit that
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _as_nice_as_workers() -> None:
    """Workers of this machine step back for other programs; tests that compute in this process
    would slow down those beside them, which have deadlines."""
    if not hasattr(os, "setpriority"):
        return
    os.setpriority(os.PRIO_PROCESS, 0, max(10, os.getpriority(os.PRIO_PROCESS, 0)))
    autogroup = Path("/proc/self/autogroup")
    with contextlib.suppress(OSError):  # not Linux, or set a moment ago by a test beside
        if (found := autogroup.read_text().split()) and int(found[-1]) < 10:
            autogroup.write_text("10")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole runs come first: at the end, none of the processes (pytest -n) is left alone
    with a long one."""
    items.sort(key=lambda item: not _WITH_RUNS & {*Path(item.nodeid.partition("::")[0]).parts})


_WITH_RUNS = {"hosts", "sweep", "tasks", "test_batch_shares.py"}


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which one can do without
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What runs side by side (pytest -n): a file stays together, as its tests share what was set
    up, and so do all hosts, as one lab is enough."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "hosts" if "/hosts/" in file else file

    # By number of tests, the files with one long test would come last, and one process would wait.
    config.option.loadscopereorder = False
    return ByFile(config, log)
