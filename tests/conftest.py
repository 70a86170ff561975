"""What all tests stand on."""

from __future__ import annotations

import signal
from collections.abc import Generator

import pytest


def pytest_sessionstart() -> None:
    """Let Ctrl-C mean something again, also for the processes that tests start.

    A shell that runs the tests in the background has them ignore it, and they hand that down.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):  # nohup ignores it, and children inherit that
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)  # so before xdist, which reads the groups first of all others
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, None, None]:
    """What runs side by side (pytest -n): a file stays together, as its tests share what was set
    up, and so do all hosts, as one lab is enough."""
    for item in items:
        group = "hosts" if item.get_closest_marker("hosts") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
    yield
