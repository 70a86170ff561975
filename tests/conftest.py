"""What all tests stand on."""

from __future__ import annotations

import signal


def pytest_sessionstart() -> None:
    """Let Ctrl-C mean something again, also for the processes that tests start.

    A shell that runs the tests in the background has them ignore it, and they hand that down.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):  # nohup ignores it, and children inherit that
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
