"""Keeps a machine awake while this process lives: a run must not end because there is no input.

macOS     caffeinate -i -w PID                 watches us, and ends when we do
Linux     systemd-inhibit ... cat              `cat` reads a pipe of ours, which ends when we do
Windows   SetThreadExecutionState              holds as long as the thread that asked for it

A machine without any of these, or where they are not allowed, may fall asleep: nothing is raised.
Closing a laptop's lid makes most of them sleep all the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

_ALIVE_S = 0.3  # a command that is not allowed to do it says so at once
_END_S = 2.0

# winbase.h: the request holds until it is changed.
_ES_CONTINUOUS, _ES_SYSTEM_REQUIRED = 0x80000000, 0x00000001

log = logging.getLogger(__name__)


@contextlib.contextmanager
def keep_awake(platform: str = sys.platform) -> Iterator[None]:
    """This machine does not fall asleep inside the `with`. Never raises; the log says what holds
    it awake, or that nothing does."""
    with contextlib.ExitStack() as stack:
        try:
            if platform == "win32":
                stack.enter_context(_held_by_a_thread())
            else:
                stack.enter_context(_held_by(command(platform)))
        except Exception as error:  # whatever it is, the run matters more
            log.info("this machine may fall asleep: %s", error)
        yield


class AwakeSwitch:
    """Keeps the machine awake while it is on, for those who need that at times only; off at the end
    of the `with`. `set` is for one thread."""

    def __init__(self) -> None:
        self._stack: contextlib.ExitStack | None = None

    @property
    def is_on(self) -> bool:
        """Whether it was switched on."""
        return self._stack is not None

    def set(self, is_on: bool) -> None:
        """Switch it; does nothing where it is so already."""
        if is_on and self._stack is None:
            self._stack = contextlib.ExitStack()
            self._stack.enter_context(keep_awake())
        elif not is_on and self._stack is not None:
            stack, self._stack = self._stack, None
            stack.close()

    def __enter__(self) -> AwakeSwitch:
        return self

    def __exit__(self, *raised: object) -> None:
        self.set(False)


def command(platform: str) -> list[str]:
    """What keeps such a system awake; OSError if it has none."""
    if platform == "darwin":
        return [_found("caffeinate"), "-i", "-w", str(os.getpid())]
    return [
        _found("systemd-inhibit"),
        "--what=idle:sleep",
        "--who=smolrun",
        "--why=a run of smolrun",
        "--mode=block",
        "cat",
    ]


def _found(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise OSError(f"{name} is not there")
    return path


@contextlib.contextmanager
def _held_by(argv: Sequence[str]) -> Iterator[None]:
    # No pipe of ours may be held by it but stdin: the end of that is what ends it.
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    threading.Thread(
        target=_tell, args=(process, os.path.basename(argv[0])), name="smolrun-awake", daemon=True
    ).start()
    try:
        yield
    finally:
        _end(process)


def _tell(process: subprocess.Popen[bytes], name: str) -> None:
    """What came of it, without keeping the run waiting."""
    try:
        code = process.wait(_ALIVE_S)
    except subprocess.TimeoutExpired:
        log.info("kept awake by %s while this process lives", name)
    else:
        log.info("this machine may fall asleep: %s ended with %d", name, code)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
        process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _windows_kernel() -> Any:
    import ctypes

    libraries: Any = vars(ctypes)["windll"]  # not there on other systems
    return libraries.kernel32


@contextlib.contextmanager
def _held_by_a_thread() -> Iterator[None]:
    """Windows ties the request to a thread, so one thread makes it and lives until the end."""
    over = threading.Event()

    def hold() -> None:
        kernel = _windows_kernel()
        if kernel.SetThreadExecutionState(_ES_CONTINUOUS | _ES_SYSTEM_REQUIRED):
            log.info("kept awake by SetThreadExecutionState while this process lives")
        else:
            log.info("this machine may fall asleep: SetThreadExecutionState refused")
        over.wait()
        kernel.SetThreadExecutionState(_ES_CONTINUOUS)

    thread = threading.Thread(target=hold, name="smolrun-awake", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_END_S)
